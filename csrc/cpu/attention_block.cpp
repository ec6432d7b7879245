#include "cpu/attention_block.hpp"

#include <array>
#include <cstring>
#include <string>

#include "core/error.hpp"
#include "core/linear.hpp"
#include "cpu/attention.hpp"
#include "cpu/gather_mlp.hpp"
#include "cpu/kernels.hpp"
#include "cpu/linear.hpp"
#include "cpu/scratch.hpp"

namespace emoe::cpu {
namespace {

struct Float32 {
    using Stored = float;
    static float wide(float value) { return value; }
    static float narrow(float value) { return value; }
};
struct BFloat16 {
    using Stored = std::uint16_t;
    static float wide(std::uint16_t bits) { return bf16_to_float(bits); }
    static std::uint16_t narrow(float value) { return float_to_bf16(value); }
};
struct Float16 {
    using Stored = std::uint16_t;
    static float wide(std::uint16_t bits) { return f16_to_float(bits); }
    static std::uint16_t narrow(float value) { return float_to_f16(value); }
};

// x * cos + turned x * sin, each product rounded and then their sum: what torch's operations give. This file is
// compiled for any CPU, so no product becomes part of a fused one.
template <typename T>
void rotate_as(void* x, const void* cos, const void* sin, std::int64_t rotated) {
    using Stored = typename T::Stored;
    auto* const head = static_cast<Stored*>(x);
    const auto* const c = static_cast<const Stored*>(cos);
    const auto* const s = static_cast<const Stored*>(sin);
    const auto turned = [&](float own, float other, std::int64_t i) {
        const float first = T::wide(T::narrow(own * T::wide(c[i])));
        const float second = T::wide(T::narrow(other * T::wide(s[i])));
        return T::narrow(first + second);
    };
    for (std::int64_t i = 0; i < rotated / 2; ++i) {
        const std::int64_t j = i + rotated / 2;
        const float low = T::wide(head[i]), high = T::wide(head[j]);
        head[i] = turned(low, -high, i);
        head[j] = turned(high, low, j);
    }
}

void rotate(DType dtype, void* x, const void* cos, const void* sin, std::int64_t rotated) {
    if (dtype == DType::kFloat32) return rotate_as<Float32>(x, cos, sin, rotated);
    return dtype == DType::kBFloat16 ? rotate_as<BFloat16>(x, cos, sin, rotated)
                                     : rotate_as<Float16>(x, cos, sin, rotated);
}

Linear linear_of(const Projection& projection, DType dtype, std::int64_t tokens, const void* x, void* y) {
    return {projection.weights, projection.base, x, tokens, dtype, projection.bias, projection.bias_dtype, y};
}

const std::byte* at(const void* data, std::int64_t elements, std::int64_t size) {
    return static_cast<const std::byte*>(data) + elements * size;
}
std::byte* at(void* data, std::int64_t elements, std::int64_t size) {
    return static_cast<std::byte*>(data) + elements * size;
}

}  // namespace

void attention_step(const AttentionBlock& block, const AttentionStep& step) {
    attention_step(block, step, active_kernels());
}

void attention_step(const AttentionBlock& block, const AttentionStep& step, const Kernels& kernels) {
    validate(block);
    validate(block, step);
    if (step.batch > kNarrowRows) {
        throw Error(ErrorKind::kConfig, "batch=" + std::to_string(step.batch) + " is more than the " +
                                            std::to_string(kNarrowRows) + " sequences of one step");
    }
    if (step.batch == 0) return;
    const std::int64_t batch = step.batch, size = itemsize(block.dtype), depth = block.depth;
    const std::int64_t q_width = block.heads * depth, kv_width = block.kv_heads * depth;
    thread_local Scratch scratch;
    void* const query = scratch.take((batch * (2 * q_width + 2 * kv_width) * size + 3) / 4);
    void* const key = at(query, batch * q_width, size);
    void* const value = at(key, batch * kv_width, size);
    void* const attended = at(value, batch * kv_width, size);

    const std::array<Linear, 3> projections = {linear_of(block.query, block.dtype, batch, step.x, query),
                                               linear_of(block.key, block.dtype, batch, step.x, key),
                                               linear_of(block.value, block.dtype, batch, step.x, value)};
    narrow_linear(projections, kernels);

    const auto norm = [&](const BlockNorm& of, void* x, std::int64_t width) {
        if (of.weight == nullptr) return;
        rms_norm({batch * width / of.width, of.width, block.dtype, of.epsilon, x, of.weight, x}, kernels);
    };
    norm(block.query_norm, query, q_width);
    norm(block.key_norm, key, kv_width);
    for (std::int64_t b = 0; b < batch; ++b) {
        const void* const cos = at(step.cos, b * step.position_stride, size);
        const void* const sin = at(step.sin, b * step.position_stride, size);
        for (std::int64_t h = 0; h < block.heads; ++h) {
            rotate(block.dtype, at(query, b * q_width + h * depth, size), cos, sin, step.rotated);
        }
        for (std::int64_t h = 0; h < block.kv_heads; ++h) {
            const std::int64_t from = b * kv_width + h * depth;
            rotate(block.dtype, at(key, from, size), cos, sin, step.rotated);
            const auto put = [&](void* cache, const HeadStrides& strides, const void* row) {
                const std::int64_t to = b * strides.batch + h * strides.head + (step.keys - 1) * strides.row;
                std::memcpy(at(cache, to, size), at(row, from, size), static_cast<std::size_t>(depth * size));
            };
            put(step.key, step.key_strides, key);
            put(step.value, step.value_strides, value);
        }
    }

    Attention attention;
    attention.batch = batch;
    attention.heads = block.heads;
    attention.kv_heads = block.kv_heads;
    attention.keys = step.keys;
    attention.depth = attention.value_depth = depth;
    attention.dtype = block.dtype;
    attention.scale = step.scale;
    attention.query = query;
    attention.query_strides = {q_width, depth, 0};
    attention.key = step.key;
    attention.key_strides = step.key_strides;
    attention.value = step.value;
    attention.value_strides = step.value_strides;
    attention.mask = step.mask;
    attention.mask_strides = step.mask_strides;
    attention.out = attended;
    attend(attention, kernels);
    linear(linear_of(block.out, block.dtype, batch, attended, step.y), kernels);
}

}  // namespace emoe::cpu
