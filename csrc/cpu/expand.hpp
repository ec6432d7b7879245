// The numbers that encoded weights stand for: the reference of every kernel, and what computes where none is faster.
#pragma once

#include <cstdint>

#include "core/weights.hpp"

namespace emoe::cpu {

// Columns [k0, k1) of row `row` (of w.count) in float32. `slot` is where the expert lies, at any address.
void expand(const Weights& w, const unsigned char* slot, std::int64_t row, std::int64_t k0, std::int64_t k1,
            float* out);

// 0 where there is none.
float bias_of(const Weights& w, const unsigned char* slot, std::int64_t row);

}  // namespace emoe::cpu
