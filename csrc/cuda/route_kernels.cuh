// From top-k ids to pairs sorted by expert and a list of tiles, without a word from the host. Nothing here depends on
// the order in which threads run: counts are integers, positions are prefix sums.
#pragma once

#include "cuda/elements.cuh"

namespace emoe::cuda {

struct Picking {
    const long long* index;  // [T,C]
    const void* weights;     // [T,C]
    int weight_type;         // RowType
    const int* slot_of;      // [E]
    int experts;
    int tokens;
    int candidates;  // C
    int top_k;       // K
    bool keep_mass;
    float* substituted;  // [T] or null
    int* id;             // [T*K] out: -1 .. E; E where there is no pick, or an id past the last expert
    int* row;            // [T*K] out: t * K + rank
    float* weight;       // [T*K] out
};

struct Sorting {
    const int* slot_of;  // [E]
    int experts;
    int pairs;
    int top_k;
    int tile_rows;
    const int* id;  // of Picking
    const int* row;
    const float* weight;
    Sorted sorted;  // out
};

// A part of a slot table as a kernel's parameter: so it needs no copy, which would wait for those of experts. With the
// other parameters it stays below the 4 KiB that every architecture takes.
constexpr int kTableChunk = 960;
struct TableChunk {
    int slot_of[kTableChunk];
};
constexpr int kTableThreads = 256;

__global__ void __launch_bounds__(kTableThreads)
    table_kernel(const TableChunk chunk, const int first, const int count, int* table) {
    for (int i = static_cast<int>(threadIdx.x); i < count; i += kTableThreads) table[first + i] = chunk.slot_of[i];
}

constexpr int kPickThreads = 128;  // a warp a token
constexpr int kSortThreads = 256;  // a block an expert
constexpr unsigned kAllLanes = 0xFFFFFFFFU;

__device__ __forceinline__ float warp_sum(float a) {
    EMOE_UNROLL
    for (int m = 16; m > 0; m /= 2) a += __shfl_xor_sync(kAllLanes, a, m);
    return a;
}

__device__ __forceinline__ int warp_sum(int a) {
    EMOE_UNROLL
    for (int m = 16; m > 0; m /= 2) a += __shfl_xor_sync(kAllLanes, a, m);
    return a;
}

// Lanes go over the candidates 32 at a time; the k-th of the token's picks is the k-th candidate that counts.
__global__ void __launch_bounds__(kPickThreads) pick_kernel(const Picking op) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    const int t = static_cast<int>(blockIdx.x * (kPickThreads / 32) + threadIdx.x / 32);
    if (t >= op.tokens) return;
    const bool restricted = op.candidates > op.top_k;
    const long long from = static_cast<long long>(t) * op.candidates;
    const long long to = static_cast<long long>(t) * op.top_k;
    int taken = 0;
    float asked = 0.0F;    // weight of the first K candidates
    float missing = 0.0F;  // ... of those that have no slot
    float given = 0.0F;    // weight of the picks
    for (int c0 = 0; c0 < op.candidates; c0 += 32) {
        const int c = c0 + lane;
        int id = op.experts;
        float weight[1] = {0.0F};
        bool resident = false;
        if (c < op.candidates) {
            const long long raw = op.index[from + c];
            id = raw < 0 ? -1 : raw < op.experts ? static_cast<int>(raw) : op.experts;
            resident = id >= 0 && id < op.experts && op.slot_of[id] >= 0;
            load_row(op.weights, op.weight_type, from + c, weight);
        }
        const bool counts = c < op.candidates && (!restricted || resident);
        const unsigned before = __ballot_sync(kAllLanes, counts);
        const int k = taken + __popc(before & ((1U << lane) - 1U));
        const bool picked = counts && k < op.top_k;
        if (picked) {
            op.id[to + k] = id;
            op.weight[to + k] = weight[0];
        }
        taken += __popc(before);
        if (c < op.top_k) asked += weight[0];
        if (c < op.top_k && !resident) missing += weight[0];
        if (picked) given += weight[0];
    }
    for (int k = taken + lane; k < op.top_k; k += 32) {
        op.id[to + k] = op.experts;
        op.weight[to + k] = 0.0F;
    }
    asked = warp_sum(asked);
    missing = warp_sum(missing);
    given = warp_sum(given);
    if (lane == 0 && op.substituted != nullptr) op.substituted[t] = asked > 0.0F ? missing / asked : 0.0F;
    const float scale = op.keep_mass && given > 0.0F ? asked / given : 1.0F;
    __syncwarp();
    for (int k = lane; k < op.top_k; k += 32) {
        const int mine = op.id[to + k];
        int rank = 0;  // over all K picks, also those of other calls
        for (int j = 0; j < op.top_k; ++j) {
            const int other = op.id[to + j];
            rank += other < mine || (other == mine && j < k) ? 1 : 0;
        }
        op.row[to + k] = static_cast<int>(to) + rank;
        if (scale != 1.0F) op.weight[to + k] *= scale;
    }
}

// Block e counts all pairs, so that it knows where its own begin, and then writes these in ascending order. Every block
// reads all ids: at most a few MiB from L2, and no block waits for another.
__global__ void __launch_bounds__(kSortThreads) sort_kernel(const Sorting op) {
    EMOE_DYNAMIC_SHARED(int, pairs_of);  // [E]
    constexpr int kWarps = kSortThreads / 32;
    EMOE_SHARED(int, sums, 2 * kWarps);
    const int tid = static_cast<int>(threadIdx.x);
    const int lane = tid % 32;
    const int warp = tid / 32;
    const int expert = static_cast<int>(blockIdx.x);
    for (int e = tid; e < op.experts; e += kSortThreads) pairs_of[e] = 0;
    __syncthreads();
    for (int p = tid; p < op.pairs; p += kSortThreads) {
        const int id = op.id[p];
        if (id >= 0 && id < op.experts) atomicAdd(&pairs_of[id], 1);
    }
    __syncthreads();
    int pairs_before = 0;
    int tiles_before = 0;
    for (int e = tid; e < expert; e += kSortThreads) {
        if (op.slot_of[e] < 0) continue;
        pairs_before += pairs_of[e];
        tiles_before += (pairs_of[e] + op.tile_rows - 1) / op.tile_rows;
    }
    pairs_before = warp_sum(pairs_before);
    tiles_before = warp_sum(tiles_before);
    if (lane == 0) {
        sums[warp] = pairs_before;
        sums[kWarps + warp] = tiles_before;
    }
    __syncthreads();
    int begin = 0;
    int first_tile = 0;
    for (int w = 0; w < kWarps; ++w) {
        begin += sums[w];
        first_tile += sums[kWarps + w];
    }
    const int slot = op.slot_of[expert];
    const int own = slot < 0 ? 0 : pairs_of[expert];
    const int tiles = (own + op.tile_rows - 1) / op.tile_rows;
    if (expert == op.experts - 1 && tid == 0) *op.sorted.tile_count = first_tile + tiles;
    if (own == 0) return;
    for (int i = tid; i < tiles; i += kSortThreads) {
        const int at = i * op.tile_rows;
        const int rows = own - at < op.tile_rows ? own - at : op.tile_rows;
        op.sorted.tiles[first_tile + i] = Tile{slot, begin + at, rows};
    }
    int next = begin;
    for (int p0 = 0; p0 < op.pairs; p0 += kSortThreads) {
        const int p = p0 + tid;
        const bool match = p < op.pairs && op.id[p] == expert;
        const unsigned matches = __ballot_sync(kAllLanes, match);
        __syncthreads();  // the sums of the round before have been read
        if (lane == 0) sums[warp] = __popc(matches);
        __syncthreads();
        int at = next + __popc(matches & ((1U << lane) - 1U));
        for (int w = 0; w < kWarps; ++w) {
            if (w < warp) at += sums[w];
            next += sums[w];
        }
        if (match) {
            op.sorted.token[at] = p / op.top_k;
            op.sorted.out_row[at] = op.row[p];
            op.sorted.weight[at] = op.weight[p];
        }
    }
}

}  // namespace emoe::cuda
