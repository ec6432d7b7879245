// The scales of encoded groups: searched for on the host, by the thread that asks.
#pragma once

#include <cstdint>

#include "cpu/gather_mlp.hpp"
#include "cpu/kernels.hpp"

namespace emoe::cpu {

// scale * code - offset near each number, codes from 0 to `most`; numbers weigh more the larger they are. A group whose
// numbers are all the same and not above zero gets no scale. `first`, `steps`: emoe/model/encode.py.
void fit_affine(const float* numbers, std::int64_t groups, std::int64_t size, int most, float first, int steps,
                float* scale, float* offset, const Kernels& kernels = active_kernels());

// scale * code near each number, codes from -most to most - 1 and a scale of either sign; `squared`: numbers weigh
// their square, otherwise all the same.
void fit_symmetric(const float* numbers, std::int64_t groups, std::int64_t size, int most, bool squared, float* scale,
                   const Kernels& kernels = active_kernels());

}  // namespace emoe::cpu
