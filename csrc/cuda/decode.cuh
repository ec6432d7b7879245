// Encoded weights as fp32, eight neighbours of a row at a time: what decode_planes.cuh and decode_blocks.cuh, which
// have a struct for each kind of codes, are made of. The bytes are those that csrc/cpu/expand.cpp reads one by one.
// Sizes and offsets are what plan.cpp lets through: depths and groups in multiples of 8, slots and codes at multiples
// of 16 bytes, other arrays at multiples of 4.
#pragma once

#include "core/codes.hpp"
#include "cuda/elements.cuh"

namespace emoe::cuda {

// emoe::Weights for a kernel; offsets in bytes from the start of a slot, negative: no such array.
struct Matrix {
    int codes;  // emoe::Codes
    int scale;  // emoe::ScaleType
    int rows;
    int depth;
    int first;
    int step;
    int scale_rows;
    int scale_cols;
    int scale_shift;  // log2 of scale_cols, or -1
    int groups;       // of scales along a row
    int bias_step;
    int bias_type;  // RowType
    long long data;
    long long scales;
    long long zeros;
    long long factor;
    long long bias;
};

struct EncodedProduct : Product {
    Matrix first;   // gate or down
    Matrix second;  // up
};

// Number i is scale * (byte i of low, high - zero) + add.
struct Eight {
    unsigned low;
    unsigned high;
    float scale;
    float zero;
    float add;
};

__device__ __forceinline__ void to_floats(const Eight& a, float (&out)[8]) {
    const float base = 8388608.0F + a.zero;  // 2^23, whose last bits a byte can take
    EMOE_UNROLL
    for (int i = 0; i < 8; ++i) {
        const unsigned bits = __byte_perm(i < 4 ? a.low : a.high, 0x4B000000U, 0x7440U + i % 4);
        out[i] = fmaf(a.scale, __uint_as_float(bits) - base, a.add);
    }
}

__device__ __forceinline__ float half_of_bits(unsigned short bits) {
    __half_raw raw;
    raw.x = bits;
    return __half2float(raw);
}
__device__ __forceinline__ float half_at(const unsigned char* p) {
    return half_of_bits(*reinterpret_cast<const unsigned short*>(p));
}
__device__ __forceinline__ float float_at(const unsigned char* p) { return *reinterpret_cast<const float*>(p); }
__device__ __forceinline__ float e4m3(unsigned byte) { return half_of_bits(half_of_e4m3(byte)) * 256.0F; }

// Eight bytes whose address is a multiple of kAlign; of 1 and 2, from the words around them.
template <int kAlign>
__device__ __forceinline__ uint2 load8(const unsigned char* p) {
    if constexpr (kAlign % 8 == 0) return *reinterpret_cast<const uint2*>(p);
    const auto off = kAlign % 4 == 0 ? 0U : static_cast<unsigned>(reinterpret_cast<unsigned long long>(p) % 4);
    const auto* words = reinterpret_cast<const unsigned*>(p - off);
    const unsigned a = words[0];
    const unsigned b = words[1];
    if (off == 0) return uint2{a, b};
    return uint2{__funnelshift_r(a, b, 8 * off), __funnelshift_r(b, words[2], 8 * off)};
}

// `shift` to the right, then some bits of each byte.
__device__ __forceinline__ uint2 bits_of(uint2 words, int shift, unsigned mask) {
    return uint2{words.x >> shift & mask, words.y >> shift & mask};
}
constexpr unsigned kLow2 = 0x03030303U;
constexpr unsigned kLow4 = 0x0F0F0F0FU;
constexpr unsigned kLow1 = 0x01010101U;
constexpr unsigned kSigns = 0x80808080U;

// Eight nibbles, lowest first, as bytes.
__device__ __forceinline__ uint2 nibbles(unsigned word) {
    const unsigned even = word & kLow4;
    const unsigned odd = word >> 4 & kLow4;
    return uint2{__byte_perm(even, odd, 0x5140U), __byte_perm(even, odd, 0x7362U)};
}
// The low four bits of each byte as eight nibbles.
__device__ __forceinline__ unsigned packed(uint2 bytes) {
    const unsigned a = bytes.x | bytes.x >> 4;
    const unsigned b = bytes.y | bytes.y >> 4;
    return __byte_perm(__byte_perm(a, 0, 0x4420U), __byte_perm(b, 0, 0x4420U), 0x5410U);
}
// Four entries of a table of signed bytes, 128 more each, by nibble.
template <const signed char (&kTable)[16]>
__device__ __forceinline__ unsigned look_up4(unsigned four) {
    constexpr auto word = [](int i) {
        unsigned bytes = 0;
        for (int j = 3; j >= 0; --j) bytes = bytes << 8 | static_cast<unsigned>(kTable[4 * i + j] + 128);
        return bytes;
    };
    constexpr unsigned kWords[4] = {word(0), word(1), word(2), word(3)};
    const unsigned low = __byte_perm(kWords[0], kWords[1], four & 0x7777U);
    const unsigned high = __byte_perm(kWords[2], kWords[3], four & 0x7777U);
    return __byte_perm(low, high, 0x3210U | (four & 0x8888U) >> 1);
}
template <const signed char (&kTable)[16]>
__device__ __forceinline__ Eight look_up(unsigned word, float scale) {
    return {look_up4<kTable>(word & 0xFFFFU), look_up4<kTable>(word >> 16), scale, 128.0F, 0.0F};
}

__device__ __forceinline__ int group_of(const Matrix& m, int k) {
    if (m.scale_cols == 0) return 0;
    return m.scale_shift >= 0 ? k >> m.scale_shift : k / m.scale_cols;
}
__device__ __forceinline__ float scale_at(const Matrix& m, const unsigned char* slot, long long i) {
    const unsigned char* p = slot + m.scales;
    switch (static_cast<ScaleType>(m.scale)) {
        case ScaleType::kFloat32:
            return float_at(p + 4 * i);
        case ScaleType::kBFloat16:
            return __uint_as_float(static_cast<unsigned>(reinterpret_cast<const unsigned short*>(p)[i]) << 16);
        case ScaleType::kFloat16:
            return half_at(p + 2 * i);
        case ScaleType::kE8M0:
            return __uint_as_float(float_of_e8m0(p[i]));
        default:
            return e4m3(p[i]);
    }
}

}  // namespace emoe::cuda
