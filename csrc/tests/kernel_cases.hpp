// Random experts in a slab and the slow fp64 reference of gather_mlp: what every instruction-set unit is compared with.
// Slots are filled with NaN bytes first, so that reading outside a tensor shows.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "core/gather_mlp.hpp"

namespace emoe::test {

struct MlpCase {
    const char* what;
    DType weights;
    DType hidden;
    DType routing;
    std::int64_t T, K, E, H, I, Ho;
    Activation activation;
    bool has_gate = true, interleaved = false, transposed = false, bias = false;
    int gap = 0;  // bytes between tensors: unaligned offsets
};

inline constexpr DType F32 = DType::kFloat32;
inline constexpr DType BF16 = DType::kBFloat16;
inline constexpr DType F16 = DType::kFloat16;

// Every layout, dtype and count of rows that any backend has to get right, or to refuse.
// clang-format off
inline const MlpCase kCases[] = {
    // what, weights, hidden, routing, T, K, E, H, I, Ho, activation, gate, interleaved, transposed, bias, gap
    {"one row",                      F32,  F32,  F32,  1,  2, 4, 64, 32, 64, Activation::kSilu},
    {"one row bf16",                 BF16, BF16, BF16, 1,  2, 4, 64, 32, 64, Activation::kSilu},
    {"one row f16",                  F16,  F16,  F16,  1,  2, 4, 64, 32, 64, Activation::kSilu},
    {"few rows, odd sizes",          F32,  F32,  F32,  7,  3, 4, 37, 19, 23, Activation::kSilu},
    {"few rows, odd sizes bf16",     BF16, BF16, F32,  7,  3, 4, 37, 19, 23, Activation::kSilu},
    {"few rows, odd sizes f16",      F16,  F32,  BF16, 7,  3, 4, 37, 19, 23, Activation::kGeluTanh},
    {"sizes of one",                 BF16, BF16, F32,  12, 1, 1, 1,  1,  1,  Activation::kSilu},
    {"many rows",                    F32,  F32,  F32,  40, 2, 3, 96, 80, 96, Activation::kSilu},
    {"many rows bf16",               BF16, BF16, BF16, 40, 2, 3, 96, 80, 96, Activation::kSilu},
    {"many rows f16",                F16,  F16,  F16,  40, 2, 3, 96, 80, 96, Activation::kSilu},
    {"bf16 weights, fp32 hidden",    BF16, F32,  F32,  40, 2, 3, 70, 33, 70, Activation::kSilu},
    {"f32 weights, bf16 hidden",     F32,  BF16, F32,  40, 2, 3, 70, 33, 70, Activation::kSilu},
    {"deeper than one depth block",  F32,  F32,  F32,  33, 1, 1, 600, 70, 65, Activation::kSilu},
    {"deeper, bf16, odd",            BF16, BF16, F32,  33, 1, 1, 1031, 71, 65, Activation::kSilu},
    {"deeper, transposed bf16, odd", BF16, BF16, F32,  33, 1, 1, 1031, 71, 65, Activation::kSilu, true, false, true},
    {"more rows than a chunk",       F32,  F32,  F32,  300, 1, 1, 40, 24, 40, Activation::kSilu},
    {"more rows than a chunk bf16",  BF16, BF16, F32,  300, 1, 1, 40, 24, 40, Activation::kSilu},
    {"wide outputs",                 BF16, F32,  F32,  3,  1, 1, 16, 600, 1100, Activation::kSilu},
    {"wide outputs, transposed",     BF16, F32,  F32,  3,  1, 1, 16, 600, 1100, Activation::kSilu, true, false, true},
    {"unaligned slots",              F32,  F32,  F32,  9,  2, 3, 37, 19, 23, Activation::kSilu, true, false, false, true, 3},
    {"unaligned slots bf16",         BF16, BF16, F32,  30, 2, 3, 37, 19, 23, Activation::kSilu, true, false, true, true, 1},
    {"gpt_oss",                      BF16, BF16, BF16, 5,  2, 4, 48, 40, 48, Activation::kSwigluClamped, true, true, true, true},
    {"gpt_oss, many rows",           BF16, BF16, BF16, 50, 2, 4, 48, 40, 48, Activation::kSwigluClamped, true, true, true, true},
    {"gpt_oss, fp32, odd",           F32,  F32,  F32,  50, 2, 4, 45, 37, 51, Activation::kSwigluClamped, true, true, true, true},
    {"silu_clamped",                 F32,  F32,  F32,  20, 2, 4, 48, 40, 48, Activation::kSiluClamped},
    {"interleaved, row-major",       F32,  F32,  F32,  20, 2, 4, 48, 41, 48, Activation::kSilu, true, true, false, true},
    {"transposed",                   F32,  F32,  F32,  20, 2, 4, 48, 41, 48, Activation::kSilu, true, false, true, true},
    {"transposed f16",               F16,  F16,  F32,  4,  2, 4, 48, 41, 48, Activation::kSilu, true, false, true, true},
    {"no gate, relu2",               F32,  F32,  F32,  20, 2, 4, 48, 41, 48, Activation::kRelu2, false},
    {"no gate, few rows bf16",       BF16, BF16, F32,  3,  2, 4, 48, 41, 48, Activation::kRelu2, false},
    {"no gate, transposed",          BF16, BF16, F32,  30, 2, 4, 48, 41, 48, Activation::kRelu, false, false, true, true},
    {"gelu",                         F32,  F32,  F32,  20, 2, 4, 48, 40, 48, Activation::kGelu},
    {"gelu_tanh",                    F32,  F32,  F32,  20, 2, 4, 48, 40, 48, Activation::kGeluTanh},
    {"relu",                         F32,  F32,  F32,  20, 2, 4, 48, 40, 48, Activation::kRelu},
    {"identity",                     F32,  F32,  F32,  20, 2, 4, 48, 40, 48, Activation::kIdentity},
};
// clang-format on

inline float value_at(const std::byte* p, DType dtype) {
    if (dtype == DType::kFloat32) {
        float a;
        std::memcpy(&a, p, 4);
        return a;
    }
    std::uint16_t half;
    std::memcpy(&half, p, 2);
    return dtype == DType::kBFloat16 ? bf16_to_float(half) : f16_to_float(half);
}

inline void put(std::byte* p, DType dtype, float a) {
    if (dtype == DType::kFloat32) {
        std::memcpy(p, &a, 4);
        return;
    }
    const std::uint16_t half = dtype == DType::kBFloat16 ? float_to_bf16(a) : float_to_f16(a);
    std::memcpy(p, &half, 2);
}

// Owns everything that a GatherMlp points to.
struct Problem {
    MlpCase c;
    MlpLayout layout;
    std::int64_t slot_bytes = 0;
    std::vector<std::byte> slab, hidden, weights;
    std::vector<std::int64_t> index;
    std::vector<std::int32_t> slot_of;

    explicit Problem(const MlpCase& which, unsigned seed = 1) : c(which) {
        std::mt19937 random(seed);
        std::normal_distribution<float> normal;
        const std::int64_t size = itemsize(c.weights);
        const std::int64_t rows = (c.has_gate ? 2 : 1) * c.I;
        layout.hidden = c.H;
        layout.intermediate = c.I;
        layout.hidden_out = c.Ho;
        layout.dtype = c.weights;
        layout.has_gate = c.has_gate;
        layout.interleaved = c.interleaved;
        layout.transposed = c.transposed;
        layout.activation = c.activation;
        layout.limit = 1.5F;
        std::int64_t at = c.gap;
        const auto place = [&](std::int64_t elements) {
            const std::int64_t offset = at;
            at += elements * size + c.gap;
            return offset;
        };
        layout.gate_up_offset = place(rows * c.H);
        if (c.bias) layout.gate_up_bias_offset = place(rows);
        layout.down_offset = place(c.Ho * c.I);
        if (c.bias) layout.down_bias_offset = place(c.Ho);
        slot_bytes = at;

        slab.assign(static_cast<std::size_t>(slot_bytes * c.E), std::byte{0xFF});
        const auto fill = [&](std::int64_t slot, std::int64_t offset, std::int64_t elements, float scale) {
            for (std::int64_t i = 0; i < elements; ++i) {
                put(slab.data() + slot * slot_bytes + offset + i * size, c.weights, normal(random) * scale);
            }
        };
        for (std::int64_t e = 0; e < c.E; ++e) {
            fill(e, layout.gate_up_offset, rows * c.H, 1.0F / std::sqrt(static_cast<float>(c.H)));
            fill(e, layout.down_offset, c.Ho * c.I, 1.0F / std::sqrt(static_cast<float>(c.I)));
            if (c.bias) fill(e, layout.gate_up_bias_offset, rows, 0.5F);
            if (c.bias) fill(e, layout.down_bias_offset, c.Ho, 0.5F);
            slot_of.push_back(static_cast<std::int32_t>(c.E - 1 - e));
        }
        hidden.resize(static_cast<std::size_t>(c.T * c.H * itemsize(c.hidden)));
        for (std::int64_t i = 0; i < c.T * c.H; ++i) {
            put(hidden.data() + i * itemsize(c.hidden), c.hidden, normal(random));
        }
        weights.resize(static_cast<std::size_t>(c.T * c.K * itemsize(c.routing)));
        for (std::int64_t i = 0; i < c.T * c.K; ++i) {
            put(weights.data() + i * itemsize(c.routing), c.routing, 0.1F + std::fabs(normal(random)));
            index.push_back(static_cast<std::int64_t>(random() % static_cast<unsigned>(c.E)));
        }
    }

    GatherMlp op(float* out, OutMode mode) const {
        GatherMlp op;
        op.layout = layout;
        op.slab = slab.data();
        op.slot_bytes = slot_bytes;
        op.slot_of = slot_of;
        op.hidden = hidden.data();
        op.hidden_dtype = c.hidden;
        op.tokens = c.T;
        op.index = index.data();
        op.weights = weights.data();
        op.weights_dtype = c.routing;
        op.top_k = c.K;
        op.out = out;
        op.mode = mode;
        return op;
    }
};

inline double reference_activation(const MlpLayout& a, double g, double u) {
    const auto sigmoid = [](double x) { return 1.0 / (1.0 + std::exp(-x)); };
    const double limit = a.limit;
    const double gc = std::min(g, limit);
    const double uc = std::max(-limit, std::min(u, limit));
    switch (a.activation) {
        case Activation::kSilu:
            return g * sigmoid(g) * u;
        case Activation::kGelu:
            return 0.5 * g * (1.0 + std::erf(g / std::sqrt(2.0))) * u;
        case Activation::kGeluTanh:
            return 0.5 * g * (1.0 + std::tanh(std::sqrt(2.0 / M_PI) * (g + 0.044715 * g * g * g))) * u;
        case Activation::kRelu:
            return std::max(g, 0.0) * u;
        case Activation::kRelu2:
            return std::max(g, 0.0) * std::max(g, 0.0) * u;
        case Activation::kIdentity:
            return g * u;
        case Activation::kSwigluClamped:
            return (uc + 1.0) * gc * sigmoid(static_cast<double>(a.alpha) * gc);
        case Activation::kSiluClamped:
            return gc * sigmoid(gc) * uc;
    }
    return 0.0;
}

// [T,K,Ho], pairs mode.
inline std::vector<double> reference(const Problem& p) {
    const MlpLayout& a = p.layout;
    const std::int64_t size = itemsize(a.dtype);
    std::vector<double> out(static_cast<std::size_t>(p.c.T * p.c.K * a.hidden_out));
    std::vector<double> h(static_cast<std::size_t>(a.intermediate));
    const std::int64_t rows = (a.has_gate ? 2 : 1) * a.intermediate;
    for (std::int64_t t = 0; t < p.c.T; ++t) {
        for (std::int64_t k = 0; k < p.c.K; ++k) {
            const std::int64_t* ids = p.index.data() + t * p.c.K;
            if (ids[k] < 0 || ids[k] >= p.c.E || p.slot_of[ids[k]] < 0) continue;
            std::int64_t rank = 0;
            for (std::int64_t j = 0; j < p.c.K; ++j) rank += ids[j] < ids[k] || (ids[j] == ids[k] && j < k);
            const std::byte* slot = p.slab.data() + p.slot_of[ids[k]] * p.slot_bytes;
            const auto weight = [&](std::int64_t offset, std::int64_t r, std::int64_t c, std::int64_t n_rows,
                                    std::int64_t n_cols) {
                return value_at(slot + offset + (a.transposed ? c * n_rows + r : r * n_cols + c) * size, a.dtype);
            };
            const auto product = [&](std::int64_t row) {
                double sum = p.c.bias ? value_at(slot + a.gate_up_bias_offset + row * size, a.dtype) : 0.0F;
                for (std::int64_t i = 0; i < a.hidden; ++i) {
                    const double x = value_at(p.hidden.data() + (t * a.hidden + i) * itemsize(p.c.hidden), p.c.hidden);
                    sum += x * weight(a.gate_up_offset, row, i, rows, a.hidden);
                }
                return sum;
            };
            for (std::int64_t i = 0; i < a.intermediate; ++i) {
                const double gate = product(a.interleaved ? 2 * i : i);
                const double up = a.has_gate ? product(a.interleaved ? 2 * i + 1 : a.intermediate + i) : 1.0;
                h[i] = reference_activation(a, gate, up);
            }
            const double routing = value_at(p.weights.data() + (t * p.c.K + k) * itemsize(p.c.routing), p.c.routing);
            for (std::int64_t n = 0; n < a.hidden_out; ++n) {
                double sum = p.c.bias ? value_at(slot + a.down_bias_offset + n * size, a.dtype) : 0.0F;
                for (std::int64_t i = 0; i < a.intermediate; ++i) {
                    sum += h[i] * weight(a.down_offset, n, i, a.hidden_out, a.intermediate);
                }
                out[(t * p.c.K + rank) * a.hidden_out + n] = routing * sum;
            }
        }
    }
    return out;
}

}  // namespace emoe::test
