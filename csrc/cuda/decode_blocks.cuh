// Codes in blocks of 32 and of 256 numbers with scales among them: GGUF's formats.
#pragma once

#include "cuda/decode.cuh"

namespace emoe::cuda {

template <int kValues, int kBytes>
struct Blocks {
    static constexpr bool kColumns = false;
    static constexpr int kAlign = kBytes % 8 == 0 ? 8 : kBytes % 4 == 0 ? 4 : 1;
    __device__ static const unsigned char* block(const Matrix& m, const unsigned char* slot, int at, int k) {
        return slot + m.data + (static_cast<long long>(at) * (m.depth / kValues) + k / kValues) * kBytes;
    }
    // Of 32 nibbles, the first 16 in the low halves of 16 bytes: the eight from `i` on.
    __device__ static uint2 halves(const unsigned char* p, int i) {
        return bits_of(load8<kAlign>(p + i % 16), i / 16 * 4, kLow4);
    }
    // Bit 4 of these, one bit each.
    __device__ static uint2 fifth(const unsigned char* bits, int i) {
        const unsigned byte = bits[i / 8];  // the product puts its bits 0 to 3 into bytes 0 to 3
        return uint2{((byte & 15U) * 0x00204081U & kLow1) << 4, ((byte >> 4) * 0x00204081U & kLow1) << 4};
    }
};

struct Q8_0 : Blocks<32, 34> {
    __device__ static void decode(const Matrix& m, const unsigned char* slot, int at, int k, float (&out)[8]) {
        const unsigned char* p = block(m, slot, at, k);
        const uint2 bytes = load8<1>(p + 2 + k % 32);
        to_floats({bytes.x ^ kSigns, bytes.y ^ kSigns, half_at(p), 128.0F, 0.0F}, out);
    }
};
// With an f16 minimum after the scale (kAffine), or around the middle; with a fifth bit or without.
template <int kBytes, bool kAffine, bool kFive>
struct SmallBlocks : Blocks<32, kBytes> {
    __device__ static void decode(const Matrix& m, const unsigned char* slot, int at, int k, float (&out)[8]) {
        using Base = Blocks<32, kBytes>;
        const unsigned char* p = Base::block(m, slot, at, k);
        constexpr int kHead = kAffine ? 4 : 2;
        uint2 codes = Base::halves(p + kHead + (kFive ? 4 : 0), k % 32);
        if constexpr (kFive) {
            const uint2 more = Base::fifth(p + kHead, k % 32);
            codes = uint2{codes.x | more.x, codes.y | more.y};
        }
        const float zero = kAffine ? 0.0F : kFive ? 16.0F : 8.0F;
        to_floats({codes.x, codes.y, half_at(p), zero, kAffine ? half_at(p + 2) : 0.0F}, out);
    }
};
using Q4_0 = SmallBlocks<18, false, false>;
using Q4_1 = SmallBlocks<20, true, false>;
using Q5_0 = SmallBlocks<22, false, true>;
using Q5_1 = SmallBlocks<24, true, true>;

struct Iq4Nl : Blocks<32, 18> {
    __device__ static void decode(const Matrix& m, const unsigned char* slot, int at, int k, float (&out)[8]) {
        const unsigned char* p = block(m, slot, at, k);
        to_floats(look_up<kIq4Values>(packed(halves(p + 2, k % 32)), half_at(p)), out);
    }
};
struct Mxfp4Blocks : Blocks<32, 17> {
    __device__ static void decode(const Matrix& m, const unsigned char* slot, int at, int k, float (&out)[8]) {
        const unsigned char* p = block(m, slot, at, k);
        const float scale = __uint_as_float(half_of_e8m0(p[0]));
        to_floats(look_up<kE2M1Doubled>(packed(halves(p + 1, k % 32)), scale), out);
    }
};

// The eight bytes that hold number i of 256 and its neighbours: 32 bytes for every 32 * kPer numbers.
template <int kAlign, int kPer>
__device__ __forceinline__ uint2 bytes_of(const unsigned char* p, int i) {
    return load8<kAlign>(p + i / (32 * kPer) * 32 + i % 32);
}

struct Q2_K : Blocks<256, 84> {
    __device__ static void decode(const Matrix& m, const unsigned char* slot, int at, int k, float (&out)[8]) {
        const unsigned char* p = block(m, slot, at, k);
        const int i = k % 256;
        const uint2 codes = bits_of(bytes_of<kAlign, 4>(p + 16, i), i / 32 % 4 * 2, kLow2);
        const unsigned scales = p[i / 16];
        const float add = -half_at(p + 82) * static_cast<float>(scales >> 4);
        to_floats({codes.x, codes.y, half_at(p + 80) * static_cast<float>(scales & 15U), 0.0F, add}, out);
    }
};
struct Q3_K : Blocks<256, 110> {
    __device__ static void decode(const Matrix& m, const unsigned char* slot, int at, int k, float (&out)[8]) {
        const unsigned char* p = block(m, slot, at, k);
        const int i = k % 256;
        const uint2 low = bits_of(bytes_of<kAlign, 4>(p + 32, i), i / 32 % 4 * 2, kLow2);
        const uint2 high = bits_of(load8<kAlign>(p + i % 32), i / 32, kLow1);
        const float scale = half_at(p + 108) * static_cast<float>(q3_k_scale(p + 96, i / 16));
        to_floats({low.x | high.x << 2, low.y | high.y << 2, scale, 4.0F, 0.0F}, out);
    }
};
// Scales and minima of six bits.
template <int kBytes>
struct WithMinima : Blocks<256, kBytes> {
    __device__ static void decode(const Matrix& m, const unsigned char* slot, int at, int k, float (&out)[8]) {
        const unsigned char* p = Blocks<256, kBytes>::block(m, slot, at, k);
        constexpr bool kFive = kBytes == 176;
        const int i = k % 256;
        const int g = i / 32;
        uint2 codes = bits_of(bytes_of<8, 2>(p + (kFive ? 48 : 16), i), g % 2 * 4, kLow4);
        if constexpr (kFive) {
            const uint2 high = bits_of(load8<8>(p + 16 + i % 32), g, kLow1);
            codes = uint2{codes.x | high.x << 4, codes.y | high.y << 4};
        }
        const uint4 head = *reinterpret_cast<const uint4*>(p);
        const SixBits six = six_bits(head.y, head.z, head.w, g);
        float d = 0.0F;
        float dmin = 0.0F;
        unpack2<__half>(head.x, d, dmin);
        to_floats({codes.x, codes.y, d * static_cast<float>(six.scale), 0.0F, -dmin * static_cast<float>(six.minimum)},
                  out);
    }
};
struct Q4_K : WithMinima<144> {};
struct Q5_K : WithMinima<176> {};

struct Q6_K : Blocks<256, 210> {
    __device__ static void decode(const Matrix& m, const unsigned char* slot, int at, int k, float (&out)[8]) {
        const unsigned char* p = block(m, slot, at, k);
        const int half = k % 256 / 128;
        const int i = k % 128;
        const uint2 low = bits_of(load8<kAlign>(p + half * 64 + i % 64), i / 64 * 4, kLow4);
        const uint2 high = bits_of(load8<kAlign>(p + 128 + half * 32 + i % 32), i / 32 * 2, kLow2);
        const auto factor = static_cast<signed char>(p[192 + half * 8 + i / 16]);
        to_floats(
            {low.x | high.x << 4, low.y | high.y << 4, half_at(p + 208) * static_cast<float>(factor), 32.0F, 0.0F},
            out);
    }
};
struct Iq4Xs : Blocks<256, 136> {
    __device__ static void decode(const Matrix& m, const unsigned char* slot, int at, int k, float (&out)[8]) {
        const unsigned char* p = block(m, slot, at, k);
        const int g = k % 256 / 32;
        const float scale = half_at(p) * static_cast<float>(iq4_xs_scale(p, g));
        to_floats(look_up<kIq4Values>(packed(halves(p + 8 + g * 16, k % 32)), scale), out);
    }
};

}  // namespace emoe::cuda
