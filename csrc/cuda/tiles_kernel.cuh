// The product for many rows an expert: tiles of 64 gathered rows by 128 matrix rows on tensor cores, fed by cp.async
// in a ring of stages. docs/cuda.md draws the tiling.
#pragma once

#include "cuda/elements.cuh"

namespace emoe::cuda {

constexpr int kTileThreads = 128;  // 2 x 2 warps, each 32 rows by 64 matrix rows
constexpr int kTileRows = 64;
constexpr int kTileColumns = 128;  // matrix rows; half as many outputs where a gate is
constexpr int kTileDepth = 32;
constexpr int kStages = 3;
// Padded so that the 8 addresses of an ldmatrix fall into different banks: strides of 20 and 68 words.
constexpr int kRowStride = kTileDepth + 8;
constexpr int kColumnStride = kTileColumns + 8;
constexpr int kSumStride = kTileColumns + 4;

// Where a thread's 16-byte chunks of a stage come from. An address of null: past the matrix, zeros.
template <class W, bool kTransposed>
struct TileSource {
    static constexpr int kA = kTileRows * kTileDepth / 8 / kTileThreads;
    static constexpr int kB = kTileColumns * kTileDepth / 8 / kTileThreads;
    static constexpr int kStageA = kTileRows * kRowStride;
    static constexpr int kStageB = kTransposed ? kTileDepth * kColumnStride : kTileColumns * kRowStride;
    const W* a[kA];
    const W* b[kB];
    int depth;
    int width;  // of a transposed matrix

    template <bool kDown>
    __device__ __forceinline__ void find_rows(const Product& op, const Tile& tile) {
        EMOE_UNROLL
        for (int i = 0; i < kA; ++i) {
            const int r = static_cast<int>(threadIdx.x) / 4 + 32 * i;
            a[i] = nullptr;
            if (r < tile.rows) {
                const int row = kDown ? tile.first + r : op.sorted.token[tile.first + r];
                a[i] = static_cast<const W*>(op.rows) + static_cast<long long>(row) * depth;
            }
        }
    }

    // Chunk i of A is row tid / 4 + 32 i.
    __device__ __forceinline__ void load_a(int step, W* stage_a, const void* anywhere) const {
        const int r = static_cast<int>(threadIdx.x) / 4;
        const int c = static_cast<int>(threadIdx.x) % 4 * 8;
        const int k = step * kTileDepth + c;
        EMOE_UNROLL
        for (int i = 0; i < kA; ++i) {
            const bool take = a[i] != nullptr && k < depth;
            copy_async16(stage_a + (r + 32 * i) * kRowStride + c, take ? a[i] + k : anywhere, take);
        }
    }

    // Chunk i of B is row tid / 4 + 32 i, or, transposed, depth tid / 16 + 8 i.
    __device__ __forceinline__ void load_b(int step, W* stage_b, const void* anywhere) const {
        const int tid = static_cast<int>(threadIdx.x);
        const int r = tid / 4;
        const int c = tid % 4 * 8;
        const int k = step * kTileDepth + c;
        EMOE_UNROLL
        for (int i = 0; i < kB; ++i) {
            if constexpr (kTransposed) {
                const int row = tid / 16 + 8 * i;
                const int kb = step * kTileDepth + row;
                const bool take = b[i] != nullptr && kb < depth;
                copy_async16(stage_b + row * kColumnStride + tid % 16 * 8,
                             take ? b[i] + static_cast<long long>(kb) * width : anywhere, take);
            } else {
                const bool take = b[i] != nullptr && k < depth;
                copy_async16(stage_b + (r + 32 * i) * kRowStride + c, take ? b[i] + k : anywhere, take);
            }
        }
    }
};

// The matrix row behind local row `local`, or -1. With a gate, octets alternate: 8 gate rows, then their 8 up rows, so
// that one thread's accumulators hold both. (Transposed and interleaved, they alternate one by one, as they lie.)
template <bool kTransposed, bool kDown>
__device__ __forceinline__ int matrix_row_of(const Shape& shape, int block, int local) {
    if (kDown || !shape.has_gate) {
        const int row = block * kTileColumns + local;
        return row < (kDown ? shape.hidden_out : shape.intermediate) ? row : -1;
    }
    if (kTransposed && shape.interleaved) {
        const int row = block * kTileColumns + local;
        return row < 2 * shape.intermediate ? row : -1;
    }
    const int i = block * (kTileColumns / 2) + local / 16 * 8 + local % 8;
    const int up = local / 8 % 2;
    if (i >= shape.intermediate) return -1;
    return shape.interleaved ? 2 * i + up : up * shape.intermediate + i;
}

// sums[m][j] of a warp: rows 16 m .., matrix rows 8 j .. of its part, in mma's layout.
template <class W, bool kTransposed>
__device__ __forceinline__ void multiply_stage(const W* stage_a, const W* stage_b, int warp_row, int warp_column,
                                               int rows, float (&sums)[2][8][4]) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    EMOE_UNROLL
    for (int k = 0; k < kTileDepth; k += 16) {
        unsigned a[2][4];
        EMOE_UNROLL
        for (int m = 0; m < 2; ++m) {
            if (warp_row + 16 * m >= rows) continue;
            ldmatrix_x4(a[m], stage_a + (warp_row + 16 * m + lane % 16) * kRowStride + k + lane / 16 * 8);
        }
        EMOE_UNROLL
        for (int j = 0; j < 8; j += 2) {
            unsigned b[4];
            if constexpr (kTransposed) {
                ldmatrix_x4_trans(b, stage_b + (k + lane % 16) * kColumnStride + warp_column + 8 * j + lane / 16 * 8);
            } else {
                ldmatrix_x4(
                    b, stage_b + (warp_column + 8 * j + lane / 16 * 8 + lane % 8) * kRowStride + k + lane / 8 % 2 * 8);
            }
            EMOE_UNROLL
            for (int m = 0; m < 2; ++m) {
                if (warp_row + 16 * m >= rows) continue;
                mma_m16n8k16<W>(sums[m][j], a[m], b[0], b[1]);
                mma_m16n8k16<W>(sums[m][j + 1], a[m], b[2], b[3]);
            }
        }
    }
}

// The sums change from mma's layout to rows in shared memory, in the place of the ring.
__device__ __forceinline__ void spread_sums(const float (&sums)[2][8][4], int warp_row, int warp_column, float* z) {
    __syncthreads();  // the last stage has been read by all
    const int lane = static_cast<int>(threadIdx.x) % 32;
    EMOE_UNROLL
    for (int m = 0; m < 2; ++m) {
        EMOE_UNROLL
        for (int j = 0; j < 8; ++j) {
            EMOE_UNROLL
            for (int half = 0; half < 2; ++half) {
                const int r = warp_row + 16 * m + lane / 4 + 8 * half;
                const int l = warp_column + 8 * j + lane % 4 * 2;
                const float2 two = {sums[m][j][2 * half], sums[m][j][2 * half + 1]};
                *reinterpret_cast<float2*>(z + r * kSumStride + l) = two;
            }
        }
    }
    __syncthreads();  // the sums are there for all
}

// Writes the block's outputs of the tile's rows; value(r, local) is a sum with its bias. `adjacent`: up lies one behind
// its gate.
template <class W, bool kDown, class Value>
__device__ __forceinline__ void store_tile(const Product& op, const Tile& tile, int block, bool adjacent,
                                           const Value& value) {
    const Shape& shape = op.shape;
    const bool gated = !kDown && shape.has_gate;
    const int outputs = kDown ? shape.hidden_out : shape.intermediate;
    const int each = gated ? kTileColumns / 2 : kTileColumns;
    const int from = block * each;
    const int count = outputs - from < each ? outputs - from : each;
    for (int r = static_cast<int>(threadIdx.x) / 32; r < tile.rows; r += kTileThreads / 32) {
        const int pair = tile.first + r;
        for (int j = static_cast<int>(threadIdx.x) % 32; j < count; j += 32) {
            if constexpr (kDown) {
                static_cast<float*>(op.result)[static_cast<long long>(op.sorted.out_row[pair]) * outputs + from + j] =
                    op.sorted.weight[pair] * value(r, j);
            } else {
                const int gate = !gated ? j : adjacent ? 2 * j : j / 8 * 16 + j % 8;
                const float up = gated ? value(r, gate + (adjacent ? 1 : 8)) : 1.0F;
                static_cast<W*>(op.result)[static_cast<long long>(pair) * outputs + from + j] =
                    from_float<W>(activate(shape, value(r, gate), up));
            }
        }
    }
}

template <class W, bool kTransposed, bool kDown>
__global__ void __launch_bounds__(kTileThreads) tiles_kernel(const Product op) {
    using Source = TileSource<W, kTransposed>;
    constexpr int kRing = kStages * (Source::kStageA + Source::kStageB) * static_cast<int>(sizeof(W));
    constexpr int kSums = kTileRows * kSumStride * static_cast<int>(sizeof(float));
    EMOE_SHARED(unsigned char, ring, kRing > kSums ? kRing : kSums);
    W* ring_a = reinterpret_cast<W*>(ring);
    W* ring_b = ring_a + kStages * Source::kStageA;
    Tile tile;
    int block = 0;
    if (!tile_of_block(op, tile, block)) return;
    const Shape& shape = op.shape;
    const int tid = static_cast<int>(threadIdx.x);
    const char* slot = op.slab + tile.slot * op.slot_bytes;
    const W* matrix = reinterpret_cast<const W*>(slot + (kDown ? shape.down : shape.gate_up));

    Source source;
    source.depth = kDown ? shape.intermediate : shape.hidden;
    source.width = kDown ? shape.hidden_out : (shape.has_gate ? 2 : 1) * shape.intermediate;
    source.template find_rows<kDown>(op, tile);
    EMOE_UNROLL
    for (int i = 0; i < Source::kB; ++i) {
        const int local = kTransposed ? tid % 16 * 8 : tid / 4 + 32 * i;
        const int row = matrix_row_of<kTransposed, kDown>(shape, block, local);
        source.b[i] = nullptr;
        if (row >= 0) source.b[i] = matrix + (kTransposed ? row : static_cast<long long>(row) * source.depth);
    }

    const int warp_row = tid / 32 % 2 * 32;
    const int warp_column = tid / 64 * 64;
    float sums[2][8][4] = {};
    const int steps = (source.depth + kTileDepth - 1) / kTileDepth;
    const auto load = [&](int step) {
        const int at = step % kStages;
        if (step < steps) {
            source.load_a(step, ring_a + at * Source::kStageA, matrix);
            source.load_b(step, ring_b + at * Source::kStageB, matrix);
        }
        copy_async_commit();  // also an empty group: the count of groups tells stages apart
    };
    EMOE_UNROLL
    for (int s = 0; s < kStages - 1; ++s) load(s);
    for (int step = 0; step < steps; ++step) {
        copy_async_wait<kStages - 2>();
        __syncthreads();  // the stage is there for all, and the one before it has been read by all
        load(step + kStages - 1);
        const int at = step % kStages;
        multiply_stage<W, kTransposed>(ring_a + at * Source::kStageA, ring_b + at * Source::kStageB, warp_row,
                                       warp_column, tile.rows, sums);
    }

    float* z = reinterpret_cast<float*>(ring);
    spread_sums(sums, warp_row, warp_column, z);
    const long long bias_at = kDown ? shape.down_bias : shape.gate_up_bias;
    const W* bias = bias_at < 0 ? nullptr : reinterpret_cast<const W*>(slot + bias_at);
    store_tile<W, kDown>(op, tile, block, kTransposed && shape.interleaved, [&](int r, int local) {
        const float sum = z[r * kSumStride + local];
        return bias == nullptr ? sum : sum + to_float(bias[matrix_row_of<kTransposed, kDown>(shape, block, local)]);
    });
}

// Hidden states in the weights' type, where they come in another one or unaligned.
template <class W>
__global__ void __launch_bounds__(256) narrow_kernel(const void* rows, int row_type, long long count, W* out) {
    const long long step = static_cast<long long>(gridDim.x) * 256;
    for (long long i = static_cast<long long>(blockIdx.x) * 256 + threadIdx.x; i < count; i += step) {
        float value[1];
        load_row(rows, row_type, i, value);
        out[i] = from_float<W>(value[0]);
    }
}

}  // namespace emoe::cuda
