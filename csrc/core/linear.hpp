// A linear layer whose weight is encoded, as data: y = x W^T + bias. docs/kernels.md states the arithmetic.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/dtype.hpp"
#include "core/weights.hpp"

namespace emoe {

struct Linear {
    Weights weights;                  // its own bias means nothing here
    const std::byte* base = nullptr;  // what the offsets of `weights` count from
    const void* x = nullptr;          // [tokens, depth] of `dtype`
    std::int64_t tokens = 0;
    DType dtype = DType::kFloat32;
    const void* bias = nullptr;  // [count] of `bias_dtype`; null: none
    DType bias_dtype = DType::kFloat32;
    void* y = nullptr;  // [tokens, count] of `dtype`
};

// ConfigError unless it is one of those that layers are computed in.
void require_float(const char* what, DType dtype);

// ConfigError where an address is missing, a size is negative or a dtype is none that is computed in.
void validate(const Linear& op);

}  // namespace emoe
