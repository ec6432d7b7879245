// The product for few rows an expert: bound by reading the weights once, so fp32 arithmetic on CUDA cores and 16-byte
// loads. Several blocks share an expert, each with its own columns; nothing is added across blocks.
#pragma once

#include "cuda/elements.cuh"
#include "cuda/route_kernels.cuh"

namespace emoe::cuda {

constexpr int kRowsThreads = 256;
constexpr int kRowsPerTile = 4;

// How a block is cut. Row-major: a warp takes 4 matrix rows, its lanes the depth. Transposed: a lane takes kPer
// neighbouring columns, lanes and warps share the depth.
template <class W, bool kVector, bool kTransposed>
struct RowsCut {
    static constexpr int kPer = kVector ? 16 / static_cast<int>(sizeof(W)) : 1;  // elements a load
    static constexpr int kLocal = kTransposed && kVector ? 64 : 32;              // matrix rows a block
    static constexpr int kWarps = kRowsThreads / 32;
    static constexpr int kPartials = kTransposed ? kWarps * kRowsPerTile * kLocal : 1;
};

// The matrix rows of a block: one or two ranges, numbered through; output j is made of local rows j * step and
// j * step + up.
struct LocalRows {
    int first[2];
    int split;  // local rows of the first range
    int total;
    int step;
    int up;
    __device__ int matrix_row(int local) const { return local < split ? first[0] + local : first[1] + local - split; }
};

template <bool kDown>
__device__ __forceinline__ LocalRows local_rows(const Shape& shape, int from, int count) {
    if (kDown || !shape.has_gate) return {{from, 0}, count, count, 1, 0};
    if (shape.interleaved) return {{2 * from, 0}, 2 * count, 2 * count, 2, 1};
    return {{from, shape.intermediate + from}, count, 2 * count, 1, count};
}

template <class W, int kPer>
__device__ __forceinline__ void load_weights(const W* p, float (&out)[kPer]) {
    if constexpr (kPer > 1) {
        unpack16<W>(load16_once(p), out);
    } else {
        out[0] = to_float(*p);
    }
}

// z[r][l] = sum over k of rows[r][k] * matrix[l][k]; kRows of them, from the addresses row_at (in elements).
template <class W, class Cut, int kRows>
__device__ __forceinline__ void products_row_major(const W* matrix, int depth, const LocalRows& local, const void* rows,
                                                   int row_type, const long long (&row_at)[kRowsPerTile], float* z) {
    constexpr int kPer = Cut::kPer;
    constexpr int kEach = Cut::kLocal / Cut::kWarps;
    const int lane = static_cast<int>(threadIdx.x) % 32;
    const int first = static_cast<int>(threadIdx.x) / 32 * kEach;
    const W* weights[kEach];
    EMOE_UNROLL
    for (int q = 0; q < kEach; ++q) {
        const int l = first + q < local.total ? first + q : local.total - 1;
        weights[q] = matrix + static_cast<long long>(local.matrix_row(l)) * depth;
    }
    float sum[kEach][kRows] = {};
    for (int k = lane * kPer; k < depth; k += 32 * kPer) {
        float w[kEach][kPer];
        EMOE_UNROLL
        for (int q = 0; q < kEach; ++q) load_weights(weights[q] + k, w[q]);
        EMOE_UNROLL
        for (int r = 0; r < kRows; ++r) {
            float x[kPer];
            load_row(rows, row_type, row_at[r] + k, x);
            EMOE_UNROLL
            for (int q = 0; q < kEach; ++q) {
                EMOE_UNROLL
                for (int j = 0; j < kPer; ++j) sum[q][r] = fmaf(w[q][j], x[j], sum[q][r]);
            }
        }
    }
    EMOE_UNROLL
    for (int q = 0; q < kEach; ++q) {
        EMOE_UNROLL
        for (int r = 0; r < kRows; ++r) {
            const float whole = warp_sum(sum[q][r]);
            if (lane == 0 && first + q < local.total) z[r * Cut::kLocal + first + q] = whole;
        }
    }
}

template <class W, class Cut, int kRows>
__device__ __forceinline__ void products_transposed(const W* matrix, int depth, int width, const LocalRows& local,
                                                    const void* rows, int row_type,
                                                    const long long (&row_at)[kRowsPerTile], float* partial, float* z) {
    constexpr int kPer = Cut::kPer;
    constexpr int kGroups = Cut::kLocal / kPer;
    constexpr int kLanes = 32 / kGroups;  // lanes of a warp that share columns
    const int tid = static_cast<int>(threadIdx.x);
    const int lane = tid % 32;
    const int warp = tid / 32;
    const int l = lane % kGroups * kPer;
    const int part = warp * kLanes + lane / kGroups;
    float sum[kRows][kPer] = {};
    if (l < local.total) {
        const W* weights = matrix + local.matrix_row(l);
        EMOE_UNROLL_BY(2)
        for (int k = part; k < depth; k += Cut::kWarps * kLanes) {
            float w[kPer];
            load_weights(weights + static_cast<long long>(k) * width, w);
            EMOE_UNROLL
            for (int r = 0; r < kRows; ++r) {
                float x[1];
                load_row(rows, row_type, row_at[r] + k, x);
                EMOE_UNROLL
                for (int j = 0; j < kPer; ++j) sum[r][j] = fmaf(w[j], x[0], sum[r][j]);
            }
        }
    }
    EMOE_UNROLL
    for (int r = 0; r < kRows; ++r) {
        EMOE_UNROLL
        for (int j = 0; j < kPer; ++j) {
            EMOE_UNROLL
            for (int m = kGroups; m < 32; m *= 2) sum[r][j] += __shfl_xor_sync(kAllLanes, sum[r][j], m);
            if (lane < kGroups) partial[(warp * kRowsPerTile + r) * Cut::kLocal + l + j] = sum[r][j];
        }
    }
    __syncthreads();
    for (int i = tid; i < kRows * Cut::kLocal; i += kRowsThreads) {
        float whole = 0.0F;
        for (int w = 0; w < Cut::kWarps; ++w) whole += partial[w * kRowsPerTile * Cut::kLocal + i];
        z[i] = whole;
    }
}

// Where the tile's rows begin, in elements. Those past it repeat its last one; what they give is not stored.
template <bool kDown>
__device__ __forceinline__ void find_rows(const Product& op, const Tile& tile, int depth,
                                          long long (&row_at)[kRowsPerTile]) {
    EMOE_UNROLL
    for (int r = 0; r < kRowsPerTile; ++r) {
        const int pair = tile.first + (r < tile.rows ? r : tile.rows - 1);
        row_at[r] = static_cast<long long>(kDown ? pair : op.sorted.token[pair]) * depth;
    }
}

// Writes outputs from .. from + count - 1 of the tile's rows; value(r, l) is the product of local row l with its bias.
template <bool kDown, class Value>
__device__ __forceinline__ void store_rows(const Product& op, const Tile& tile, const LocalRows& local, int from,
                                           int count, const Value& value) {
    const Shape& shape = op.shape;
    const int outputs = kDown ? shape.hidden_out : shape.intermediate;
    for (int i = static_cast<int>(threadIdx.x); i < tile.rows * count; i += kRowsThreads) {
        const int r = i / count;
        const int j = i % count;
        const int pair = tile.first + r;
        auto* result = static_cast<float*>(op.result);
        if constexpr (kDown) {
            result[static_cast<long long>(op.sorted.out_row[pair]) * outputs + from + j] =
                op.sorted.weight[pair] * value(r, j);
        } else {
            const float gate = value(r, j * local.step);
            const float up = shape.has_gate ? value(r, j * local.step + local.up) : 1.0F;
            result[static_cast<long long>(pair) * outputs + from + j] = activate(shape, gate, up);
        }
    }
}

template <class W, bool kVector, bool kTransposed, bool kDown>
__global__ void __launch_bounds__(kRowsThreads) rows_kernel(const Product op) {
    using Cut = RowsCut<W, kVector, kTransposed>;
    EMOE_SHARED(float, z, kRowsPerTile* Cut::kLocal);
    EMOE_SHARED(float, partial, Cut::kPartials);
    Tile tile;
    int block = 0;
    if (!tile_of_block(op, tile, block)) return;
    const Shape& shape = op.shape;
    const int depth = kDown ? shape.intermediate : shape.hidden;
    const int outputs = kDown ? shape.hidden_out : shape.intermediate;
    const int each = !kDown && shape.has_gate ? Cut::kLocal / 2 : Cut::kLocal;
    const int from = block * each;
    const int count = outputs - from < each ? outputs - from : each;
    const LocalRows local = local_rows<kDown>(shape, from, count);
    const char* slot = op.slab + tile.slot * op.slot_bytes;
    const W* matrix = reinterpret_cast<const W*>(slot + (kDown ? shape.down : shape.gate_up));

    long long row_at[kRowsPerTile];
    find_rows<kDown>(op, tile, depth, row_at);
    if constexpr (kTransposed) {
        const int width = !kDown && shape.has_gate ? 2 * outputs : outputs;
        if (tile.rows == 1) {
            products_transposed<W, Cut, 1>(matrix, depth, width, local, op.rows, op.row_type, row_at, partial, z);
        } else {
            products_transposed<W, Cut, kRowsPerTile>(matrix, depth, width, local, op.rows, op.row_type, row_at,
                                                      partial, z);
        }
    } else {
        if (tile.rows == 1) {
            products_row_major<W, Cut, 1>(matrix, depth, local, op.rows, op.row_type, row_at, z);
        } else {
            products_row_major<W, Cut, kRowsPerTile>(matrix, depth, local, op.rows, op.row_type, row_at, z);
        }
    }
    __syncthreads();

    const long long bias_at = kDown ? shape.down_bias : shape.gate_up_bias;
    const W* bias = bias_at < 0 ? nullptr : reinterpret_cast<const W*>(slot + bias_at);
    store_rows<kDown>(op, tile, local, from, count, [&](int r, int l) {
        const float product = z[r * Cut::kLocal + l];
        return bias == nullptr ? product : product + to_float(bias[local.matrix_row(l)]);
    });
}

}  // namespace emoe::cuda
