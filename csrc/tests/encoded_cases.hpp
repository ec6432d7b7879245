// Random encoded experts in a slab and the fp64 reference of gather_mlp on what expand() says they are. Slots are
// filled with 0xFF first, so that reading outside an array shows.
#pragma once

#include <cmath>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "cpu/expand.hpp"
#include "tests/kernel_cases.hpp"

namespace emoe::test {

struct CodesCase {
    Codes codes;
    ScaleType scale = ScaleType::kNone;
    std::int64_t scale_rows = 0, scale_cols = 0;
    bool zeros = false;
};

// clang-format off
inline const CodesCase kCodesCases[] = {
    {Codes::kFloat32}, {Codes::kFloat16}, {Codes::kBFloat16},
    {Codes::kQ8_0}, {Codes::kQ4_0}, {Codes::kQ4_1}, {Codes::kQ5_0}, {Codes::kQ5_1}, {Codes::kQ2_K}, {Codes::kQ3_K},
    {Codes::kQ4_K}, {Codes::kQ5_K}, {Codes::kQ6_K}, {Codes::kIq4Nl}, {Codes::kIq4Xs}, {Codes::kMxfp4Blocks},
    {Codes::kE4M3, ScaleType::kFloat32, 128, 128}, {Codes::kE4M3, ScaleType::kBFloat16, 1, 0},
    {Codes::kE4M3, ScaleType::kE8M0, 1, 32}, {Codes::kE4M3, ScaleType::kFloat16, 0, 0},
    {Codes::kE4M3, ScaleType::kFloat32, 3, 24}, {Codes::kE5M2, ScaleType::kFloat32, 32, 32},
    {Codes::kInt8, ScaleType::kFloat32, 1, 0}, {Codes::kInt8, ScaleType::kBFloat16, 1, 64},
    {Codes::kInt8, ScaleType::kFloat32, 7, 40}, {Codes::kUInt8B128, ScaleType::kBFloat16, 1, 128},
    {Codes::kUInt8B128, ScaleType::kFloat16, 1, 0},
    {Codes::kE2M1, ScaleType::kE8M0, 1, 32}, {Codes::kE2M1, ScaleType::kE4M3, 1, 16},
    {Codes::kE2M1Divided, ScaleType::kE4M3, 1, 16},
    {Codes::kInt4, ScaleType::kBFloat16, 1, 32}, {Codes::kInt4, ScaleType::kFloat16, 1, 128, true},
    {Codes::kInt4, ScaleType::kFloat32, 1, 0}, {Codes::kInt4, ScaleType::kFloat32, 1, 16, true},
    {Codes::kAwq, ScaleType::kFloat16, 1, 128}, {Codes::kAwq, ScaleType::kBFloat16, 1, 32},
    {Codes::kGptq, ScaleType::kFloat16, 1, 128}, {Codes::kGptq, ScaleType::kFloat16, 1, 0},
    {Codes::kGptqV2, ScaleType::kFloat32, 1, 64},
    {Codes::kIq1S}, {Codes::kIq1M}, {Codes::kIq2Xxs}, {Codes::kIq2Xs}, {Codes::kIq2S}, {Codes::kIq3Xxs}, {Codes::kIq3S},
};
// clang-format on

inline std::string described(const CodesCase& c) {
    return std::string(codes_row(c.codes).name) + "-" + std::to_string(c.scale_rows) + "x" +
           std::to_string(c.scale_cols) + "-" + std::string(scale_name(c.scale)) + (c.zeros ? "-zeros" : "");
}

struct EncodedCase {
    CodesCase gate, up, down;
    DType hidden;
    std::int64_t T, K, E, H, I, Ho;
    bool has_gate = true, interleaved = false, bias = false;
};

struct EncodedProblem {
    EncodedCase c;
    MlpLayout layout;
    std::int64_t slot_bytes = 0;
    std::vector<std::byte> slab, hidden;
    std::vector<float> weights;
    std::vector<std::int64_t> index;
    std::vector<std::int32_t> slot_of;
    std::int64_t unit;
    std::mt19937 random;

    // Arrays start at multiples of `alignment`, and so do slots; 1: at odd addresses.
    explicit EncodedProblem(const EncodedCase& which, unsigned seed = 1, std::int64_t alignment = 1)
        : c(which), unit(alignment), random(seed) {
        layout.hidden = c.H;
        layout.intermediate = c.I;
        layout.hidden_out = c.Ho;
        layout.has_gate = c.has_gate;
        layout.interleaved = c.interleaved;
        layout.encoded = true;
        std::int64_t at = 1;
        const std::int64_t step = c.interleaved ? 2 : 1;
        layout.gate = place(c.gate, step * c.I, c.H, c.I, step, at);
        if (c.has_gate) layout.up = place(c.up, step * c.I, c.H, c.I, step, at);
        layout.down = place(c.down, c.Ho, c.I, c.Ho, 1, at);
        slot_bytes = aligned(at);
        slab.assign(static_cast<std::size_t>(slot_bytes * c.E), std::byte{0xFF});
        for (std::int64_t e = 0; e < c.E; ++e) {
            std::byte* slot = slab.data() + e * slot_bytes;
            fill(layout.gate, slot);
            if (c.has_gate) fill(layout.up, slot);
            fill(layout.down, slot);
            slot_of.push_back(static_cast<std::int32_t>(c.E - 1 - e));
        }
        hidden.resize(static_cast<std::size_t>(c.T * c.H * itemsize(c.hidden)));
        for (std::int64_t i = 0; i < c.T * c.H; ++i) put(hidden.data() + i * itemsize(c.hidden), c.hidden, normal());
        for (std::int64_t i = 0; i < c.T * c.K; ++i) {
            weights.push_back(0.1F + std::fabs(normal()));
            index.push_back(static_cast<std::int64_t>(random() % static_cast<unsigned>(c.E)));
        }
    }

    std::int64_t aligned(std::int64_t at) const { return (at + unit - 1) / unit * unit; }
    float normal() { return std::normal_distribution<float>()(random); }

    Weights place(const CodesCase& codes, std::int64_t rows, std::int64_t depth, std::int64_t count, std::int64_t step,
                  std::int64_t& at) const {
        Weights w;
        w.codes = codes.codes;
        w.rows = rows;
        w.depth = depth;
        w.first = step - 1;
        w.step = step;
        w.count = count;
        w.scale = codes.scale;
        w.scale_rows = codes.scale_rows;
        w.scale_cols = codes.scale_cols;
        const CodesIn in = codes_row(codes.codes).in;
        const auto next = [&](std::int64_t& offset) {
            offset = aligned(at);
            at = extent(w) + 3;
        };
        next(w.data);
        if (codes.scale != ScaleType::kNone) next(w.scales);
        if (codes.zeros || in == CodesIn::kColumns) next(w.zeros);
        if (codes.scale == ScaleType::kE4M3) next(w.factor);
        if (c.bias) next(w.bias);
        validate(w, described(codes));
        return w;
    }

    void fill(const Weights& w, std::byte* slot) {
        const float size = 1.0F / std::sqrt(static_cast<float>(w.depth));
        const auto bytes = [&](std::int64_t from, std::int64_t to) {
            for (std::int64_t i = from; i < to; ++i) slot[i] = static_cast<std::byte>(random() & 0xFF);
        };
        const auto some = [&] { return size * (0.5F + 0.5F * std::fabs(normal())); };
        Weights only = w;  // the arrays one after another, so that extent() gives the end of each
        only.scales = only.zeros = only.factor = only.bias = -1;
        const std::int64_t end = extent(only);
        const CodesRow& row = codes_row(w.codes);
        bytes(w.data, end);
        if (row.in == CodesIn::kValues) {
            const DType dtype = parse_dtype(row.name);
            for (std::int64_t i = w.data; i < end; i += row.bytes) put(slot + i, dtype, size * normal());
        }
        for (std::int64_t i = w.data; i < end && row.in == CodesIn::kBlocks; i += row.bytes) {
            const auto half = [&](int at) { put(slot + i + at, F16, some() / 8); };
            switch (w.codes) {
                case Codes::kMxfp4Blocks:
                    slot[i] = static_cast<std::byte>(115 + random() % 6);
                    break;
                case Codes::kIq1M:  // a scale of 0x1...
                    slot[i + 55] = (slot[i + 55] & std::byte{0x0F}) | std::byte{0x10};
                    break;
                case Codes::kQ2_K:
                    half(80), half(82);
                    break;
                case Codes::kQ3_K:
                    half(108);
                    break;
                case Codes::kQ6_K:
                    half(208);
                    break;
                case Codes::kQ4_1:
                case Codes::kQ5_1:
                case Codes::kQ4_K:
                case Codes::kQ5_K:
                    half(2);
                    [[fallthrough]];
                default:
                    half(0);
            }
        }
        if (w.codes == Codes::kE4M3 || w.codes == Codes::kE5M2) {  // neither NaN nor infinite
            for (std::int64_t i = w.data; i < end; ++i) {
                if ((slot[i] & std::byte{0x7C}) == std::byte{0x7C}) slot[i] &= std::byte{0xBF};
            }
        }
        if (w.scales >= 0) {
            only.scales = w.scales;
            const std::int64_t last = extent(only);
            for (std::int64_t i = w.scales; i < last; i += scale_bytes(w.scale)) {
                if (w.scale == ScaleType::kE8M0) slot[i] = static_cast<std::byte>(115 + random() % 6);
                if (w.scale == ScaleType::kE4M3) slot[i] = static_cast<std::byte>(0x20 + random() % 24);
                if (w.scale == ScaleType::kFloat32) put(slot + i, F32, some());
                if (w.scale == ScaleType::kBFloat16) put(slot + i, BF16, some());
                if (w.scale == ScaleType::kFloat16) put(slot + i, F16, some());
            }
        }
        if (w.zeros >= 0) {
            only.zeros = w.zeros;
            bytes(w.zeros, extent(only));
        }
        if (w.factor >= 0) put(slot + w.factor, F32, w.codes == Codes::kE2M1 ? 0.05F : 20.0F);
        for (std::int64_t i = 0; w.bias >= 0 && i < w.count; ++i) put(slot + w.bias + 4 * i, F32, 0.3F * normal());
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
        op.top_k = c.K;
        op.out = out;
        op.mode = mode;
        return op;
    }
};

// [T,K,Ho], pairs mode.
inline std::vector<double> reference(const EncodedProblem& p) {
    const EncodedCase& c = p.c;
    std::vector<double> out(static_cast<std::size_t>(c.T * c.K * c.Ho));
    std::vector<double> h(static_cast<std::size_t>(c.T * c.K * c.I));
    std::vector<double> x;
    for (std::int64_t i = 0; i < c.T * c.H; ++i) {
        x.push_back(value_at(p.hidden.data() + i * itemsize(c.hidden), c.hidden));
    }
    std::vector<float> gate(static_cast<std::size_t>(c.H));
    std::vector<float> up(static_cast<std::size_t>(c.H));
    std::vector<float> down(static_cast<std::size_t>(c.I));
    const auto dot = [](const std::vector<float>& row, const double* with) {
        double sum = 0.0;
        for (std::size_t k = 0; k < row.size(); ++k) sum += with[k] * row[k];
        return sum;
    };
    for (std::int64_t e = 0; e < c.E; ++e) {
        if (p.slot_of[e] < 0) continue;
        const auto* slot = reinterpret_cast<const unsigned char*>(p.slab.data() + p.slot_of[e] * p.slot_bytes);
        const auto row_of = [&](const Weights& w, std::int64_t r, std::vector<float>& row) {
            cpu::expand(w, slot, r, 0, w.depth, row.data());
            return static_cast<double>(cpu::bias_of(w, slot, r));
        };
        for (std::int64_t r = 0; r < c.I; ++r) {
            const double gate_bias = row_of(p.layout.gate, r, gate);
            const double up_bias = c.has_gate ? row_of(p.layout.up, r, up) : 1.0;
            for (std::int64_t pair = 0; pair < c.T * c.K; ++pair) {
                if (p.index[pair] != e) continue;
                const double* with = x.data() + pair / c.K * c.H;
                const double its_up = c.has_gate ? up_bias + dot(up, with) : 1.0;
                h[pair * c.I + r] = reference_activation(p.layout, gate_bias + dot(gate, with), its_up);
            }
        }
        for (std::int64_t r = 0; r < c.Ho; ++r) {
            const double bias = row_of(p.layout.down, r, down);
            for (std::int64_t pair = 0; pair < c.T * c.K; ++pair) {
                const std::int64_t* ids = p.index.data() + pair / c.K * c.K;
                if (p.index[pair] != e) continue;
                std::int64_t rank = 0;
                for (std::int64_t j = 0; j < c.K; ++j) rank += ids[j] < e || (ids[j] == e && j < pair % c.K);
                out[(pair / c.K * c.K + rank) * c.Ho + r] = p.weights[pair] * (bias + dot(down, h.data() + pair * c.I));
            }
        }
    }
    return out;
}

}  // namespace emoe::test
