// Codes whose scales lie in an array of their own, and numbers as they are.
#pragma once

#include "cuda/decode.cuh"

namespace emoe::cuda {

template <class W>
struct Values {
    static constexpr bool kColumns = false;
    __device__ static void decode(const Matrix& m, const unsigned char* slot, int at, int k, float (&out)[8]) {
        load_elements(reinterpret_cast<const W*>(slot + m.data) + static_cast<long long>(at) * m.depth + k, out);
    }
};

struct ByteCodes {
    static constexpr bool kColumns = false;
    __device__ static uint2 codes(const Matrix& m, const unsigned char* slot, int at, int k) {
        return load8<8>(slot + m.data + static_cast<long long>(at) * m.depth + k);
    }
    __device__ static float scale(const Matrix& m, const unsigned char* slot, int at, int k) {
        const int row = m.scale_rows == 0 ? 0 : m.scale_rows == 1 ? at : at / m.scale_rows;
        return scale_at(m, slot, static_cast<long long>(row) * m.groups + group_of(m, k));
    }
};
// A byte is the upper half of a float16: all of e5m2, and e4m3 once its bits are in place.
template <bool kE4M3>
struct ByteFloats : ByteCodes {
    __device__ static void decode(const Matrix& m, const unsigned char* slot, int at, int k, float (&out)[8]) {
        const uint2 bytes = codes(m, slot, at, k);
        const float factor = scale(m, slot, at, k);
        EMOE_UNROLL
        for (int i = 0; i < 8; ++i) {
            const unsigned byte = (i < 4 ? bytes.x : bytes.y) >> i % 4 * 8 & 255U;
            out[i] = (kE4M3 ? e4m3(byte) : half_of_bits(static_cast<unsigned short>(byte << 8))) * factor;
        }
    }
};
struct E4M3 : ByteFloats<true> {};
struct E5M2 : ByteFloats<false> {};

struct UInt8B128 : ByteCodes {
    __device__ static void decode(const Matrix& m, const unsigned char* slot, int at, int k, float (&out)[8]) {
        const uint2 bytes = codes(m, slot, at, k);
        to_floats({bytes.x, bytes.y, scale(m, slot, at, k), 128.0F, 0.0F}, out);
    }
};
struct Int8 : ByteCodes {
    __device__ static void decode(const Matrix& m, const unsigned char* slot, int at, int k, float (&out)[8]) {
        const uint2 bytes = codes(m, slot, at, k);
        to_floats({bytes.x ^ kSigns, bytes.y ^ kSigns, scale(m, slot, at, k), 128.0F, 0.0F}, out);
    }
};

__device__ __forceinline__ unsigned word_at(const unsigned char* p, long long i) {
    return reinterpret_cast<const unsigned*>(p)[i];
}

struct E2M1 {
    static constexpr bool kColumns = false;
    __device__ static void decode(const Matrix& m, const unsigned char* slot, int at, int k, float (&out)[8]) {
        const unsigned word = word_at(slot + m.data, static_cast<long long>(at) * (m.depth / 8) + k / 8);
        float scale = 0.5F * scale_at(m, slot, static_cast<long long>(at) * m.groups + group_of(m, k));
        if (m.factor >= 0) {
            const float factor = float_at(slot + m.factor);
            scale = m.codes == static_cast<int>(Codes::kE2M1) ? scale * factor : scale / factor;
        }
        to_floats(look_up<kE2M1Doubled>(word, scale), out);
    }
};

struct Int4 {
    static constexpr bool kColumns = false;
    __device__ static void decode(const Matrix& m, const unsigned char* slot, int at, int k, float (&out)[8]) {
        const unsigned word = word_at(slot + m.data, static_cast<long long>(at) * (m.depth / 8) + k / 8);
        const int group = group_of(m, k);
        unsigned zero = 8;
        if (m.zeros >= 0) {
            const long long i = static_cast<long long>(at / 8) * m.groups + group;
            zero = word_at(slot + m.zeros, i) >> at % 8 * 4 & 15U;
        }
        const uint2 codes = nibbles(word);
        const float scale = scale_at(m, slot, static_cast<long long>(at) * m.groups + group);
        to_floats({codes.x, codes.y, scale, static_cast<float>(zero), 0.0F}, out);
    }
};

// A row of the arrays for each (octet or group of) input: lanes take neighbouring rows of the matrix.
template <bool kAwq>
struct ColumnCodes {
    static constexpr bool kColumns = true;
    __device__ static void decode(const Matrix& m, const unsigned char* slot, int at, int k, float (&out)[8]) {
        const long long group = group_of(m, k);
        const int shift = 4 * (kAwq ? awq_nibble(at % 8) : at % 8);
        unsigned zero = word_at(slot + m.zeros, group * (m.rows / 8) + at / 8) >> shift & 15U;
        if (m.codes == static_cast<int>(Codes::kGptq)) zero += 1;
        uint2 codes{0, 0};
        if constexpr (kAwq) {
            EMOE_UNROLL
            for (int i = 0; i < 8; ++i) {
                const unsigned word = word_at(slot + m.data, static_cast<long long>(k + i) * (m.rows / 8) + at / 8);
                (i < 4 ? codes.x : codes.y) |= (word >> shift & 15U) << i % 4 * 8;
            }
        } else {
            codes = nibbles(word_at(slot + m.data, static_cast<long long>(k / 8) * m.rows + at));
        }
        to_floats({codes.x, codes.y, scale_at(m, slot, group * m.rows + at), static_cast<float>(zero), 0.0F}, out);
    }
};
struct Awq : ColumnCodes<true> {};
struct Gptq : ColumnCodes<false> {};

}  // namespace emoe::cuda
