// What encoded weights are made of, by number, and the parts of their arithmetic that a CPU and a GPU share.
// Without the standard library, so that device code can include it.
#pragma once

#ifdef __CUDACC__
#define EMOE_HOST_DEVICE __host__ __device__
#else
#define EMOE_HOST_DEVICE
#endif

namespace emoe {

// How the weights of a matrix are coded: emoe/model/encoding.py has the same words, emoe/model/decode.py what they
// mean.
enum class Codes : unsigned char {
    kFloat32,
    kFloat16,
    kBFloat16,
    kE4M3,
    kE5M2,
    kInt8,
    kUInt8B128,
    kE2M1,
    kE2M1Divided,
    kInt4,
    kAwq,
    kGptq,
    kGptqV2,
    kQ8_0,
    kQ4_0,
    kQ4_1,
    kQ5_0,
    kQ5_1,
    kQ2_K,
    kQ3_K,
    kQ4_K,
    kQ5_K,
    kQ6_K,
    kIq1S,
    kIq1M,
    kIq2Xxs,
    kIq2Xs,
    kIq2S,
    kIq3Xxs,
    kIq3S,
    kIq4Nl,
    kIq4Xs,
    kMxfp4Blocks,
};

// Whether codes are entries of a table (core/iq.hpp).
EMOE_HOST_DEVICE constexpr bool has_grid(Codes codes) { return codes >= Codes::kIq1S && codes <= Codes::kIq3S; }

enum class ScaleType : unsigned char { kNone, kFloat32, kBFloat16, kFloat16, kE8M0, kE4M3 };

// Numbers by their nibble; of e2m1 twice the value, so that it is whole (gguf_mxfp4 halves its scale).
// Not inline: a unit of one instruction set exports its table of kernels and nothing else.
constexpr signed char kE2M1Doubled[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};
constexpr signed char kIq4Values[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};

// Which nibble of a word of AWQ holds the output `at` of eight neighbours: 0, 4, 1, 5, 2, 6, 3, 7.
EMOE_HOST_DEVICE constexpr int awq_nibble(int at) { return at / 2 + at % 2 * 4; }

// The float16 that is 2^8 times smaller than the e4m3, by its bits.
EMOE_HOST_DEVICE constexpr unsigned short half_of_e4m3(unsigned byte) {
    const unsigned value = (byte & 0x7FU) == 0x7FU ? 0x7E00U : (byte & 0x7FU) << 7;
    return static_cast<unsigned short>((byte & 0x80U) << 8 | value);
}

// 2^(byte - 127) by its bits; 255 is no number.
EMOE_HOST_DEVICE constexpr unsigned float_of_e8m0(unsigned byte) {
    return byte == 0 ? 0x00400000U : byte == 255 ? 0x7FC00000U : byte << 23;
}

// 2^(byte - 128), the scale of gguf_mxfp4, by its bits.
EMOE_HOST_DEVICE constexpr unsigned half_of_e8m0(unsigned byte) {
    return byte < 2 ? 0x00200000U << byte : (byte - 1) << 23;
}

struct SixBits {
    int scale;
    int minimum;
};

// Group g of q4_k and q5_k, from the twelve bytes of its scales as words.
EMOE_HOST_DEVICE constexpr SixBits six_bits(unsigned a, unsigned b, unsigned c, int g) {
    const int at = g % 4 * 8;
    if (g < 4) return {static_cast<int>(a >> at & 63U), static_cast<int>(b >> at & 63U)};
    const unsigned low = c >> at & 255U;
    return {static_cast<int>((low & 15U) | (a >> at >> 6 & 3U) << 4),
            static_cast<int>(low >> 4 | (b >> at >> 6 & 3U) << 4)};
}

// The scale of values 16 j to 16 j + 15 of a block of q3_k; `p` are the twelve bytes of its scales.
EMOE_HOST_DEVICE constexpr int q3_k_scale(const unsigned char* p, int j) {
    const int low = j < 8 ? p[j] & 15 : p[j - 8] >> 4;
    return (low | ((p[8 + j % 4] >> (j / 4 * 2)) & 3) << 4) - 32;
}

// The scale of group g of a block of iq4_xs.
EMOE_HOST_DEVICE constexpr int iq4_xs_scale(const unsigned char* block, int g) {
    const int low = (block[4 + g / 2] >> (g % 2 * 4)) & 15;
    return (low | ((block[2 + g / 4] >> (g % 4 * 2)) & 3) << 4) - 32;
}

}  // namespace emoe
