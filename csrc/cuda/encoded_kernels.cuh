// The two products with encoded weights: as rows_kernel and tiles_kernel, whose parts they share, but weights become
// numbers on the way, in registers (rows, fp32) or on the way into shared memory (tiles, 16 bits).
#pragma once

#include "cuda/decode_any.cuh"
#include "cuda/rows_kernel.cuh"
#include "cuda/tiles_kernel.cuh"

namespace emoe::cuda {

// A row of the product's matrices: `second` is a row of up.
__device__ __forceinline__ Matrix matrix_of(const EncodedProduct& op, bool second) {
    return second ? op.second : op.first;
}
__device__ __forceinline__ float bias_of(const EncodedProduct& op, const char* slot, bool second, int row) {
    const Matrix m = matrix_of(op, second);
    if (m.bias < 0) return 0.0F;
    float value[1];
    load_row(slot + m.bias, m.bias_type, static_cast<long long>(row) * m.bias_step, value);
    return value[0];
}

// What looks its codes up takes one matrix row at a time, so that the code of all codes is there once.
template <class Decoder>
constexpr bool kOneByOne = false;
template <>
constexpr bool kOneByOne<AnyCodes> = true;

using EncodedCut = RowsCut<float, false, false>;

// As products_row_major, eight inputs a lane.
template <class Decoder, int kRows>
__device__ __forceinline__ void products_encoded(const EncodedProduct& op, const char* slot, int depth, int from,
                                                 const LocalRows& local, const long long (&row_at)[kRowsPerTile],
                                                 float* z) {
    constexpr int kEach = EncodedCut::kLocal / EncodedCut::kWarps;
    constexpr int kAtOnce = kOneByOne<Decoder> ? 1 : kRows == 1 ? kEach : kEach / 2;  // what registers hold
    const int lane = static_cast<int>(threadIdx.x) % 32;
    const auto* bytes = reinterpret_cast<const unsigned char*>(slot);
    EMOE_UNROLL_BY(1)
    for (int first = static_cast<int>(threadIdx.x) / 32 * kEach, end = first + kEach; first < end; first += kAtOnce) {
        Matrix m[kAtOnce];
        int at[kAtOnce];
        EMOE_UNROLL
        for (int q = 0; q < kAtOnce; ++q) {
            const int l = first + q < local.total ? first + q : local.total - 1;
            m[q] = matrix_of(op, l >= local.split);
            at[q] = m[q].first + (from + (l >= local.split ? l - local.split : l)) * m[q].step;
        }
        float sum[kAtOnce][kRows] = {};
        for (int k = lane * 8; k < depth; k += 32 * 8) {
            float w[kAtOnce][8];
            EMOE_UNROLL
            for (int q = 0; q < kAtOnce; ++q) Decoder::decode(m[q], bytes, at[q], k, w[q]);
            EMOE_UNROLL
            for (int r = 0; r < kRows; ++r) {
                float x[8];
                load_row(op.rows, op.row_type, row_at[r] + k, x);
                EMOE_UNROLL
                for (int q = 0; q < kAtOnce; ++q) {
                    EMOE_UNROLL
                    for (int j = 0; j < 8; ++j) sum[q][r] = fmaf(w[q][j], x[j], sum[q][r]);
                }
            }
        }
        EMOE_UNROLL
        for (int q = 0; q < kAtOnce; ++q) {
            EMOE_UNROLL
            for (int r = 0; r < kRows; ++r) {
                const float whole = warp_sum(sum[q][r]);
                if (lane == 0 && first + q < local.total) z[r * EncodedCut::kLocal + first + q] = whole;
            }
        }
    }
}

// Where the arrays have a row for each input: a lane takes a row of the matrix, warps share the depth.
template <class Decoder, int kRows>
__device__ __forceinline__ void products_columns(const EncodedProduct& op, const char* slot, int depth, int from,
                                                 const LocalRows& local, const long long (&row_at)[kRowsPerTile],
                                                 float* partial, float* z) {
    const int tid = static_cast<int>(threadIdx.x);
    const int lane = tid % 32;
    const int l = lane < local.total ? lane : local.total - 1;
    const Matrix m = matrix_of(op, l >= local.split);
    const int at = m.first + (from + (l >= local.split ? l - local.split : l)) * m.step;
    float sum[kRows] = {};
    for (int k = tid / 32 * 8; k < depth; k += EncodedCut::kWarps * 8) {
        float w[8];
        Decoder::decode(m, reinterpret_cast<const unsigned char*>(slot), at, k, w);
        EMOE_UNROLL
        for (int r = 0; r < kRows; ++r) {
            float x[8];
            load_row(op.rows, op.row_type, row_at[r] + k, x);
            EMOE_UNROLL
            for (int j = 0; j < 8; ++j) sum[r] = fmaf(w[j], x[j], sum[r]);
        }
    }
    EMOE_UNROLL
    for (int r = 0; r < kRows; ++r) partial[(tid / 32 * kRowsPerTile + r) * EncodedCut::kLocal + lane] = sum[r];
    __syncthreads();
    for (int i = tid; i < kRows * EncodedCut::kLocal; i += kRowsThreads) {
        float whole = 0.0F;
        for (int w = 0; w < EncodedCut::kWarps; ++w) whole += partial[w * kRowsPerTile * EncodedCut::kLocal + i];
        z[i] = whole;
    }
}

template <class Decoder, int kRows>
__device__ __forceinline__ void products(const EncodedProduct& op, const char* slot, int depth, int from,
                                         const LocalRows& local, const long long (&row_at)[kRowsPerTile],
                                         float* partial, float* z) {
    if constexpr (Decoder::kColumns) {
        products_columns<Decoder, kRows>(op, slot, depth, from, local, row_at, partial, z);
    } else {
        products_encoded<Decoder, kRows>(op, slot, depth, from, local, row_at, z);
    }
}

template <class Decoder, bool kDown>
__global__ void __launch_bounds__(kRowsThreads, 2) encoded_rows_kernel(const EncodedProduct op) {
    constexpr int kLocal = EncodedCut::kLocal;
    EMOE_SHARED(float, z, kRowsPerTile* kLocal);
    EMOE_SHARED(float, partial, Decoder::kColumns ? EncodedCut::kWarps * kRowsPerTile * kLocal : 1);
    Tile tile;
    int block = 0;
    if (!tile_of_block(op, tile, block)) return;
    const int depth = kDown ? op.shape.intermediate : op.shape.hidden;
    const int outputs = kDown ? op.shape.hidden_out : op.shape.intermediate;
    const int each = !kDown && op.shape.has_gate ? kLocal / 2 : kLocal;
    const int from = block * each;
    const int count = outputs - from < each ? outputs - from : each;
    const LocalRows local = local_rows<kDown>(op.shape, from, count);
    const char* slot = op.slab + tile.slot * op.slot_bytes;
    long long row_at[kRowsPerTile];
    find_rows<kDown>(op, tile, depth, row_at);
    if (tile.rows == 1) {
        products<Decoder, 1>(op, slot, depth, from, local, row_at, partial, z);
    } else {
        products<Decoder, kRowsPerTile>(op, slot, depth, from, local, row_at, partial, z);
    }
    __syncthreads();  // the products are there for all
    store_rows<kDown>(op, tile, local, from, count, [&](int r, int l) {
        const bool second = l >= local.split;
        return z[r * kLocal + l] + bias_of(op, slot, second, from + (second ? l - local.split : l));
    });
}

// The row of the matrix behind local row `local`, or -1, and whether it is one of up: octets of both alternate.
template <bool kDown>
__device__ __forceinline__ int encoded_row_of(const Shape& shape, int block, int local, bool& second) {
    second = !kDown && shape.has_gate && local / 8 % 2 == 1;
    const bool gated = !kDown && shape.has_gate;
    const int row = gated ? block * (kTileColumns / 2) + local / 16 * 8 + local % 8 : block * kTileColumns + local;
    return row < (kDown ? shape.hidden_out : shape.intermediate) ? row : -1;
}

// Two elements of a register, lower half first.
template <class W>
__device__ __forceinline__ unsigned pack2(float low, float high);
template <>
__device__ __forceinline__ unsigned pack2<__nv_bfloat16>(float low, float high) {
    const __nv_bfloat162_raw both = __floats2bfloat162_rn(low, high);
    return static_cast<unsigned>(both.y) << 16 | both.x;
}
template <>
__device__ __forceinline__ unsigned pack2<__half>(float low, float high) {
    const __half2_raw both = __floats2half2_rn(low, high);
    return static_cast<unsigned>(both.y) << 16 | both.x;
}

// Weights of a step in shared memory. Chunk i of a thread is eight inputs of row tid / 4 + 32 i, or, where the
// arrays have a row for each input, of row tid.
template <class W, class Decoder, bool kDown>
__device__ __forceinline__ void decode_stage(const EncodedProduct& op, const char* slot, int block, int depth, int step,
                                             W* stage) {
    const int tid = static_cast<int>(threadIdx.x);
    constexpr int kChunks = kTileColumns * kTileDepth / 8 / kTileThreads;
    constexpr int kAtOnce = kOneByOne<Decoder> ? 1 : kChunks;
    EMOE_UNROLL_BY(kAtOnce)
    for (int i = 0; i < kChunks; ++i) {
        const int local = Decoder::kColumns ? tid : tid / 4 + 32 * i;
        const int c = 8 * (Decoder::kColumns ? i : tid % 4);
        const int k = step * kTileDepth + c;
        bool second = false;
        const int row = encoded_row_of<kDown>(op.shape, block, local, second);
        uint4 bits{0, 0, 0, 0};
        if (row >= 0 && k < depth) {
            const Matrix m = matrix_of(op, second);
            float w[8];
            Decoder::decode(m, reinterpret_cast<const unsigned char*>(slot), m.first + row * m.step, k, w);
            bits = uint4{pack2<W>(w[0], w[1]), pack2<W>(w[2], w[3]), pack2<W>(w[4], w[5]), pack2<W>(w[6], w[7])};
        }
        *reinterpret_cast<uint4*>(stage + local * kRowStride + c) = bits;
    }
}

template <class W, class Decoder, bool kDown>
__global__ void __launch_bounds__(kTileThreads) encoded_tiles_kernel(const EncodedProduct op) {
    using Source = TileSource<W, false>;
    constexpr int kRing = (kStages * Source::kStageA + 2 * Source::kStageB) * static_cast<int>(sizeof(W));
    constexpr int kSums = kTileRows * kSumStride * static_cast<int>(sizeof(float));
    EMOE_SHARED(unsigned char, ring, kRing > kSums ? kRing : kSums);
    W* ring_a = reinterpret_cast<W*>(ring);
    W* ring_b = ring_a + kStages * Source::kStageA;
    Tile tile;
    int block = 0;
    if (!tile_of_block(op, tile, block)) return;
    const char* slot = op.slab + tile.slot * op.slot_bytes;
    Source source;
    source.depth = kDown ? op.shape.intermediate : op.shape.hidden;
    source.template find_rows<kDown>(op, tile);

    const int warp_row = static_cast<int>(threadIdx.x) / 32 % 2 * 32;
    const int warp_column = static_cast<int>(threadIdx.x) / 64 * 64;
    float sums[2][8][4] = {};
    const int steps = (source.depth + kTileDepth - 1) / kTileDepth;
    const auto load = [&](int step) {
        if (step < steps) source.load_a(step, ring_a + step % kStages * Source::kStageA, slot);
        copy_async_commit();  // also an empty group: the count of groups tells stages apart
    };
    EMOE_UNROLL
    for (int s = 0; s < kStages - 1; ++s) load(s);
    decode_stage<W, Decoder, kDown>(op, slot, block, source.depth, 0, ring_b);
    for (int step = 0; step < steps; ++step) {
        copy_async_wait<kStages - 2>();
        __syncthreads();  // the step is there for all, and the one before it has been read by all
        load(step + kStages - 1);
        if (step + 1 < steps) {
            W* stage = ring_b + (step + 1) % 2 * Source::kStageB;
            decode_stage<W, Decoder, kDown>(op, slot, block, source.depth, step + 1, stage);
        }
        multiply_stage<W, false>(ring_a + step % kStages * Source::kStageA, ring_b + step % 2 * Source::kStageB,
                                 warp_row, warp_column, tile.rows, sums);
    }
    float* z = reinterpret_cast<float*>(ring);
    spread_sums(sums, warp_row, warp_column, z);
    store_tile<W, kDown>(op, tile, block, false, [&](int r, int local) {
        bool second = false;
        const int row = encoded_row_of<kDown>(op.shape, block, local, second);
        return z[r * kSumStride + local] + bias_of(op, slot, second, row);
    });
}

}  // namespace emoe::cuda
