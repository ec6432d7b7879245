// What every kernel shares: one expert's shape as plain numbers, loads of any element type as fp32, the activations.
// Plain CUDA C++ without the standard library, so that NVRTC takes it too.
#pragma once

#include "cuda/port.cuh"

namespace emoe::cuda {

// MlpLayout for a kernel: sizes in elements, offsets in bytes from the start of a slot, negative: no bias.
struct Shape {
    int hidden;
    int intermediate;
    int hidden_out;
    bool has_gate;
    bool interleaved;
    int activation;  // emoe::Activation
    float alpha;
    float limit;
    long long gate_up;
    long long gate_up_bias;
    long long down;
    long long down_bias;
};

// Rows that meet one expert: sorted pairs first .. first + rows - 1, weights in slot `slot`.
struct Tile {
    int slot;
    int first;
    int rows;
};

// The routing of one call, sorted by expert.
struct Sorted {
    int* token;     // [P]
    int* out_row;   // [P]
    float* weight;  // [P]
    Tile* tiles;
    int* tile_count;
};

enum RowType : int { kRowF32, kRowF16, kRowBF16 };

// One product of the MLP over all tiles: gate_up and activation, or down and the weighting.
struct Product {
    Shape shape;
    const char* slab;
    long long slot_bytes;
    Sorted sorted;
    const void* rows;  // gate_up: hidden states by token; down: activations by sorted pair
    int row_type;      // RowType; the tiles kernel takes the weights' type only
    void* result;      // gate_up: activations by sorted pair, [P,I]; down: float pairs [T*K,Ho]
    int blocks;        // blocks of columns; the grid is blocks * tiles
};

__device__ __forceinline__ float to_float(float a) { return a; }
__device__ __forceinline__ float to_float(__half a) { return __half2float(a); }
__device__ __forceinline__ float to_float(__nv_bfloat16 a) { return __bfloat162float(a); }

template <class W>
__device__ __forceinline__ W from_float(float a);
template <>
__device__ __forceinline__ float from_float<float>(float a) {
    return a;
}
template <>
__device__ __forceinline__ __half from_float<__half>(float a) {
    return __float2half_rn(a);
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float a) {
    return __float2bfloat16_rn(a);
}

// The two elements of a register, lower half first.
template <class W>
__device__ __forceinline__ void unpack2(unsigned bits, float& low, float& high);
template <>
__device__ __forceinline__ void unpack2<__nv_bfloat16>(unsigned bits, float& low, float& high) {
    low = __uint_as_float(bits << 16);
    high = __uint_as_float(bits & 0xFFFF0000U);
}
template <>
__device__ __forceinline__ void unpack2<__half>(unsigned bits, float& low, float& high) {
    __half2_raw raw;
    raw.x = static_cast<unsigned short>(bits & 0xFFFFU);
    raw.y = static_cast<unsigned short>(bits >> 16);
    const float2 both = __half22float2(raw);
    low = both.x;
    high = both.y;
}

// A 16-byte register group as fp32: 8 values of a 16-bit type, 4 of fp32.
template <class W>
__device__ __forceinline__ void unpack16(uint4 bits, float (&out)[16 / sizeof(W)]) {
    if constexpr (sizeof(W) == 4) {
        out[0] = __uint_as_float(bits.x);
        out[1] = __uint_as_float(bits.y);
        out[2] = __uint_as_float(bits.z);
        out[3] = __uint_as_float(bits.w);
    } else {
        unpack2<W>(bits.x, out[0], out[1]);
        unpack2<W>(bits.y, out[2], out[3]);
        unpack2<W>(bits.z, out[4], out[5]);
        unpack2<W>(bits.w, out[6], out[7]);
    }
}

template <class X, int kCount>
__device__ __forceinline__ void load_elements(const X* p, float (&out)[kCount]) {
    if constexpr (kCount * sizeof(X) % 16 == 0) {
        constexpr int kPer = 16 / sizeof(X);
        EMOE_UNROLL
        for (int i = 0; i < kCount / kPer; ++i) {
            float part[kPer];
            unpack16<X>(reinterpret_cast<const uint4*>(p)[i], part);
            EMOE_UNROLL
            for (int j = 0; j < kPer; ++j) out[i * kPer + j] = part[j];
        }
    } else if constexpr (kCount * sizeof(X) == 8) {
        const uint2 bits = *reinterpret_cast<const uint2*>(p);
        unpack2<X>(bits.x, out[0], out[1]);
        unpack2<X>(bits.y, out[2], out[3]);
    } else {
        EMOE_UNROLL
        for (int j = 0; j < kCount; ++j) out[j] = to_float(p[j]);
    }
}

// kCount elements of a row whose type the call names. With kCount > 1, `at` is a multiple of it and the row aligned.
template <int kCount>
__device__ __forceinline__ void load_row(const void* rows, int type, long long at, float (&out)[kCount]) {
    if (type == kRowF32) {
        load_elements(static_cast<const float*>(rows) + at, out);
    } else if (type == kRowBF16) {
        load_elements(static_cast<const __nv_bfloat16*>(rows) + at, out);
    } else {
        load_elements(static_cast<const __half*>(rows) + at, out);
    }
}

__device__ __forceinline__ float sigmoid(float a) { return 1.0F / (1.0F + expf(-a)); }

// activation(gate) * up; without a gate `up` is one. Comparisons are written so that a NaN passes, which fminf drops.
__device__ __forceinline__ float activate(const Shape& shape, float gate, float up) {
    switch (shape.activation) {
        case 0:  // silu
            return gate * sigmoid(gate) * up;
        case 1:  // gelu
            return 0.5F * gate * (1.0F + erff(gate * 0.70710678118654752F)) * up;
        case 2: {  // gelu_tanh: 0.5 (1 + tanh y) is sigmoid(2y), without its cancellation
            const float y = gate * fmaf(0.044715F * gate, gate, 1.0F);
            return gate * sigmoid(1.5957691216057308F * y) * up;
        }
        case 3:  // relu
            return (gate < 0.0F ? 0.0F : gate) * up;
        case 4: {  // relu2
            const float positive = gate < 0.0F ? 0.0F : gate;
            return positive * positive * up;
        }
        case 5:  // identity
            return gate * up;
        default: {
            const float g = gate > shape.limit ? shape.limit : gate;
            const float u = up > shape.limit ? shape.limit : up < -shape.limit ? -shape.limit : up;
            if (shape.activation == 6) return (u + 1.0F) * g * sigmoid(shape.alpha * g);  // swiglu_clamped
            return g * sigmoid(g) * u;                                                    // silu_clamped
        }
    }
}

// The block's tile, or false where the grid's upper bound is past the tiles there are.
__device__ __forceinline__ bool tile_of_block(const Product& op, Tile& tile, int& block) {
    const int at = static_cast<int>(blockIdx.x) / op.blocks;
    block = static_cast<int>(blockIdx.x) % op.blocks;
    if (at >= *op.sorted.tile_count) return false;
    tile = op.sorted.tiles[at];
    return true;
}

}  // namespace emoe::cuda
