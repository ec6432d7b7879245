// Attention of one row of each sequence over the keys and values before it, and RMSNorm, as data.
// docs/kernels.md states the arithmetic.
#pragma once

#include <cstdint>

#include "core/dtype.hpp"

namespace emoe {

// Elements from one sequence, head and token to the next; those of a head follow each other.
struct HeadStrides {
    std::int64_t batch = 0;
    std::int64_t head = 0;
    std::int64_t row = 0;  // of keys and values
};

// Head h of a query meets head h / (heads / kv_heads) of keys and values.
struct Attention {
    std::int64_t batch = 0;
    std::int64_t heads = 0;
    std::int64_t kv_heads = 0;
    std::int64_t keys = 0;
    std::int64_t depth = 0;        // of queries and keys
    std::int64_t value_depth = 0;  // of values and outputs
    DType dtype = DType::kFloat32;
    float scale = 1.0F;
    const void* query = nullptr;  // [batch, heads, depth]
    const void* key = nullptr;    // [batch, kv_heads, keys, depth]
    const void* value = nullptr;  // [batch, kv_heads, keys, value_depth]
    HeadStrides query_strides;
    HeadStrides key_strides;
    HeadStrides value_strides;
    const unsigned char* mask = nullptr;  // [batch, heads, keys], 0: not seen; null: all are
    HeadStrides mask_strides;
    void* out = nullptr;  // [batch, heads, value_depth]
};

constexpr std::int64_t kMostHeadDepth = 1024;

// ConfigError where an address is missing, a size is out of range, or the dtype is none that is computed in.
void validate(const Attention& op);

// out [rows, width] = weight [width] times the rows of x, each over the root of its mean square plus epsilon. What is
// multiplied by the weight is rounded to the dtype first, and then the product.
struct RmsNorm {
    std::int64_t rows = 0;
    std::int64_t width = 0;
    DType dtype = DType::kFloat32;
    float epsilon = 0.0F;
    const void* x = nullptr;
    const void* weight = nullptr;
    void* out = nullptr;
};

void validate(const RmsNorm& op);

}  // namespace emoe
