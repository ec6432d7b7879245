// A decode step of an attention block, as data: projections of one row of each sequence, norms and rotary positions of
// its queries and keys, attention over the cache, the projection of what that gives. docs/kernels.md states the
// arithmetic.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/attention.hpp"
#include "core/dtype.hpp"
#include "core/weights.hpp"

namespace emoe {

struct Projection {
    Weights weights;                  // their own bias means nothing here
    const std::byte* base = nullptr;  // what the offsets of `weights` count from
    const void* bias = nullptr;       // [count] of `bias_dtype`; null: none
    DType bias_dtype = DType::kFloat32;
};

struct BlockNorm {
    const void* weight = nullptr;  // [width] of the block's dtype; null: no norm
    std::int64_t width = 0;        // of a head, or of all heads together
    float epsilon = 0.0F;
};

// Head h of a query is elements h * depth and following of the outputs of its projection, and so are those of keys and
// values.
struct AttentionBlock {
    DType dtype = DType::kFloat32;  // of x, y and the cache
    std::int64_t heads = 0;
    std::int64_t kv_heads = 0;
    std::int64_t depth = 0;  // of a head
    Projection query, key, value, out;
    BlockNorm query_norm, key_norm;
};

struct AttentionStep {
    std::int64_t batch = 0;
    const void* x = nullptr;  // [batch, inputs]
    const void* cos = nullptr;
    const void* sin = nullptr;         // [batch, rotated] of the block's dtype
    std::int64_t rotated = 0;          // elements of a head that turn, its first ones: i with i + rotated / 2
    std::int64_t position_stride = 0;  // elements of `cos` and `sin` from a sequence to the next; 0: all share a row
    std::int64_t keys = 0;             // rows of the cache, the last of which this step writes
    void* key = nullptr;               // [batch, kv_heads, keys, depth]
    void* value = nullptr;
    HeadStrides key_strides;
    HeadStrides value_strides;
    const unsigned char* mask = nullptr;  // as Attention has it
    HeadStrides mask_strides;
    float scale = 1.0F;
    void* y = nullptr;  // [batch, outputs]
};

// ConfigError where an address is missing, or sizes contradict each other.
void validate(const AttentionBlock& block);
void validate(const AttentionBlock& block, const AttentionStep& step);

}  // namespace emoe
