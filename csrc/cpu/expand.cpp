// Compiled for the baseline CPU: the instruction-set units call it, and must not have its inline functions.
#include "cpu/expand.hpp"

#include <algorithm>
#include <bit>
#include <cstring>

#include "core/iq.hpp"

namespace emoe::cpu {
namespace {

constexpr int kMostValues = 256;  // of a block

template <typename T>
T load(const unsigned char* p) {
    T value;
    std::memcpy(&value, p, sizeof value);
    return value;
}

float half(const unsigned char* p) { return f16_to_float(load<std::uint16_t>(p)); }
float e4m3(std::uint8_t byte) { return f16_to_float(half_of_e4m3(byte)) * 256.0F; }
float e5m2(std::uint8_t byte) { return f16_to_float(static_cast<std::uint16_t>(byte << 8)); }
float e8m0(std::uint8_t byte) { return std::bit_cast<float>(float_of_e8m0(byte)); }

float float_at(const unsigned char* p, std::int64_t i, DType dtype) {
    if (dtype == DType::kFloat32) return load<float>(p + 4 * i);
    const auto bits = load<std::uint16_t>(p + 2 * i);
    return dtype == DType::kBFloat16 ? bf16_to_float(bits) : f16_to_float(bits);
}

float scale_at(const unsigned char* scales, std::int64_t i, ScaleType scale) {
    switch (scale) {
        case ScaleType::kFloat32:
            return load<float>(scales + 4 * i);
        case ScaleType::kBFloat16:
            return bf16_to_float(load<std::uint16_t>(scales + 2 * i));
        case ScaleType::kFloat16:
            return half(scales + 2 * i);
        case ScaleType::kE8M0:
            return e8m0(scales[i]);
        case ScaleType::kE4M3:
            return e4m3(scales[i]);
        case ScaleType::kNone:
            break;
    }
    return 1.0F;
}

int nibble(const unsigned char* words, std::int64_t i) { return (words[i / 2] >> (i % 2 * 4)) & 15; }

// Low nibbles are values 0 to 15, high nibbles 16 to 31.
int halves(const unsigned char* p, int i) { return i < 16 ? p[i] & 15 : p[i - 16] >> 4; }

int fifth(const unsigned char* bits, int i) { return ((bits[i / 8] >> (i % 8)) & 1) << 4; }

void q_k_with_minimum(Codes codes, const unsigned char* p, float* out) {
    const float d = half(p);
    const float dmin = half(p + 2);
    const bool five = codes == Codes::kQ5_K;
    const unsigned char* high = p + 16;
    const unsigned char* low = p + (five ? 48 : 16);
    for (int g = 0; g < 8; ++g) {
        const auto [scale, minimum] = six_bits(load<unsigned>(p + 4), load<unsigned>(p + 8), load<unsigned>(p + 12), g);
        const float s = d * static_cast<float>(scale);
        const float m = dmin * static_cast<float>(minimum);
        for (int i = 0; i < 32; ++i) {
            int q = (low[g / 2 * 32 + i] >> (g % 2 * 4)) & 15;
            if (five) q |= ((high[i] >> g) & 1) << 4;
            out[g * 32 + i] = s * static_cast<float>(q) - m;
        }
    }
}

void q2_k(const unsigned char* p, float* out) {
    const float d = half(p + 80);
    const float dmin = half(p + 82);
    for (int i = 0; i < 256; ++i) {
        const int q = (p[16 + i / 128 * 32 + i % 32] >> (i / 32 % 4 * 2)) & 3;
        const unsigned char scales = p[i / 16];
        out[i] = d * static_cast<float>(scales & 15) * static_cast<float>(q) - dmin * static_cast<float>(scales >> 4);
    }
}

void q3_k(const unsigned char* p, float* out) {
    const float d = half(p + 108);
    for (int i = 0; i < 256; ++i) {
        const int scale = q3_k_scale(p + 96, i / 16);
        const int high = (p[i % 32] >> (i / 32)) & 1;
        const int q = ((p[32 + i / 128 * 32 + i % 32] >> (i / 32 % 4 * 2)) & 3) - (high != 0 ? 0 : 4);
        out[i] = d * static_cast<float>(scale) * static_cast<float>(q);
    }
}

void q6_k(const unsigned char* p, float* out) {
    const float d = half(p + 208);
    for (int i = 0; i < 256; ++i) {
        const int part = i % 128;
        const int low = (p[i / 128 * 64 + part % 64] >> (part / 64 * 4)) & 15;
        const int high = (p[128 + i / 128 * 32 + part % 32] >> (part / 32 * 2)) & 3;
        const float scale = d * static_cast<float>(static_cast<std::int8_t>(p[192 + i / 16]));
        out[i] = scale * static_cast<float>((low | high << 4) - 32);
    }
}

void iq4_xs(const unsigned char* p, float* out) {
    const float d = half(p);
    for (int g = 0; g < 8; ++g) {
        const float s = d * static_cast<float>(iq4_xs_scale(p, g));
        for (int i = 0; i < 32; ++i) out[g * 32 + i] = s * static_cast<float>(kIq4Values[halves(p + 8 + g * 16, i)]);
    }
}

template <class Q>
void iq_block(const unsigned char* p, float* out) {
    constexpr int kValues = sizeof(typename Q::Entry);
    const float unit = f16_to_float(static_cast<std::uint16_t>(Q::unit(p))) * Q::kBy;
    for (int i = 0; i < 256; ++i) {
        const int g = i / 32;
        const int l = i % 32 / kValues;
        int level = static_cast<std::int8_t>(Q::entry(p, g, l) >> (i % kValues * 8) & 255U);
        if constexpr (requires { &Q::offset; }) {
            level += Q::offset(p, g, l);
        } else {
            level = Q::signs(p, g) >> (i % 32) & 1U ? -level : level;
        }
        out[i] = unit * static_cast<float>(Q::scale(p, i / 16) * level);
    }
}

// One block of 32.
void small_block(Codes codes, const unsigned char* p, float* out) {
    const float d = codes == Codes::kMxfp4Blocks ? std::bit_cast<float>(half_of_e8m0(p[0])) : half(p);
    for (int i = 0; i < 32; ++i) {
        switch (codes) {
            case Codes::kQ8_0:
                out[i] = d * static_cast<float>(static_cast<std::int8_t>(p[2 + i]));
                break;
            case Codes::kQ4_0:
                out[i] = d * static_cast<float>(halves(p + 2, i) - 8);
                break;
            case Codes::kQ4_1:
                out[i] = d * static_cast<float>(halves(p + 4, i)) + half(p + 2);
                break;
            case Codes::kQ5_0:
                out[i] = d * static_cast<float>((halves(p + 6, i) | fifth(p + 2, i)) - 16);
                break;
            case Codes::kQ5_1:
                out[i] = d * static_cast<float>(halves(p + 8, i) | fifth(p + 4, i)) + half(p + 2);
                break;
            case Codes::kIq4Nl:
                out[i] = d * static_cast<float>(kIq4Values[halves(p + 2, i)]);
                break;
            default:
                out[i] = d * static_cast<float>(kE2M1Doubled[halves(p + 1, i)]);
        }
    }
}

void expand_block(Codes codes, const unsigned char* p, float* out) {
    switch (codes) {
        case Codes::kQ2_K:
            return q2_k(p, out);
        case Codes::kQ3_K:
            return q3_k(p, out);
        case Codes::kQ4_K:
        case Codes::kQ5_K:
            return q_k_with_minimum(codes, p, out);
        case Codes::kQ6_K:
            return q6_k(p, out);
        case Codes::kIq4Xs:
            return iq4_xs(p, out);
        case Codes::kIq1S:
            return iq_block<iq::Iq1S>(p, out);
        case Codes::kIq1M:
            return iq_block<iq::Iq1M>(p, out);
        case Codes::kIq2Xxs:
            return iq_block<iq::Iq2Xxs>(p, out);
        case Codes::kIq2Xs:
            return iq_block<iq::Iq2Xs>(p, out);
        case Codes::kIq2S:
            return iq_block<iq::Iq2S>(p, out);
        case Codes::kIq3Xxs:
            return iq_block<iq::Iq3Xxs>(p, out);
        case Codes::kIq3S:
            return iq_block<iq::Iq3S>(p, out);
        default:
            return small_block(codes, p, out);
    }
}

void expand_blocks(const Weights& w, const unsigned char* row, std::int64_t k0, std::int64_t k1, float* out) {
    const CodesRow& codes = codes_row(w.codes);
    float block[kMostValues];
    for (std::int64_t k = k0; k < k1;) {
        const std::int64_t inside = k % codes.values;
        const std::int64_t n = std::min<std::int64_t>(codes.values - inside, k1 - k);
        expand_block(w.codes, row + k / codes.values * codes.bytes, block);
        std::copy_n(block + inside, n, out + (k - k0));
        k += n;
    }
}

// A code less its zero, where each has scales of its own group; `at` is the row among all that lie there.
float scaled_code(const Weights& w, const unsigned char* slot, std::int64_t at, std::int64_t k) {
    const std::int64_t group = w.scale_cols == 0 ? 0 : k / w.scale_cols;
    const std::int64_t groups = w.scale_cols == 0 ? 1 : (w.depth + w.scale_cols - 1) / w.scale_cols;
    const unsigned char* codes = slot + w.data;
    const unsigned char* scales = slot + w.scales;
    const unsigned char* zeros = slot + w.zeros;
    switch (w.codes) {
        case Codes::kE4M3:
        case Codes::kE5M2:
        case Codes::kInt8:
        case Codes::kUInt8B128: {
            const std::uint8_t byte = codes[at * w.depth + k];
            const float value = w.codes == Codes::kE4M3        ? e4m3(byte)
                                : w.codes == Codes::kE5M2      ? e5m2(byte)
                                : w.codes == Codes::kUInt8B128 ? static_cast<float>(byte - 128)
                                                               : static_cast<float>(static_cast<std::int8_t>(byte));
            const std::int64_t row = w.scale_rows == 0 ? 0 : at / w.scale_rows;
            return value * scale_at(scales, row * groups + group, w.scale);
        }
        case Codes::kE2M1:
        case Codes::kE2M1Divided: {
            const float value = 0.5F * static_cast<float>(kE2M1Doubled[nibble(codes + at * (w.depth / 2), k)]) *
                                scale_at(scales, at * groups + group, w.scale);
            if (w.factor < 0) return value;
            const auto factor = load<float>(slot + w.factor);
            return w.codes == Codes::kE2M1 ? value * factor : value / factor;
        }
        case Codes::kInt4: {
            const int zero = w.zeros < 0 ? 8 : nibble(zeros + (at / 8 * groups + group) * 4, at % 8);
            const int code = nibble(codes + at * ((w.depth + 7) / 8) * 4, k);
            return static_cast<float>(code - zero) * scale_at(scales, at * groups + group, w.scale);
        }
        case Codes::kAwq: {
            const int place = awq_nibble(static_cast<int>(at % 8));
            const int code = nibble(codes + (k * (w.rows / 8) + at / 8) * 4, place);
            const int zero = nibble(zeros + (group * (w.rows / 8) + at / 8) * 4, place);
            return static_cast<float>(code - zero) * scale_at(scales, group * w.rows + at, w.scale);
        }
        default: {
            const int code = nibble(codes + (k / 8 * w.rows + at) * 4, k % 8);
            const int zero = nibble(zeros + (group * (w.rows / 8) + at / 8) * 4, at % 8);
            const int less = w.codes == Codes::kGptq ? 1 : 0;
            return static_cast<float>(code - zero - less) * scale_at(scales, group * w.rows + at, w.scale);
        }
    }
}

DType plain_dtype(Codes codes) {
    return codes == Codes::kFloat32 ? DType::kFloat32 : codes == Codes::kFloat16 ? DType::kFloat16 : DType::kBFloat16;
}

}  // namespace

void expand(const Weights& w, const unsigned char* slot, std::int64_t row, std::int64_t k0, std::int64_t k1,
            float* out) {
    const CodesRow& codes = codes_row(w.codes);
    const std::int64_t at = w.first + row * w.step;
    if (codes.in == CodesIn::kBlocks) {
        return expand_blocks(w, slot + w.data + at * (w.depth / codes.values) * codes.bytes, k0, k1, out);
    }
    if (codes.in == CodesIn::kValues) {
        const unsigned char* values = slot + w.data + at * w.depth * codes.bytes;
        for (std::int64_t k = k0; k < k1; ++k) out[k - k0] = float_at(values, k, plain_dtype(w.codes));
        return;
    }
    for (std::int64_t k = k0; k < k1; ++k) out[k - k0] = scaled_code(w, slot, at, k);
}

float bias_of(const Weights& w, const unsigned char* slot, std::int64_t row) {
    return w.bias < 0 ? 0.0F : float_at(slot + w.bias, row * w.bias_step, w.bias_dtype);
}

}  // namespace emoe::cpu
