// What one instruction-set unit exports, and the plain structs it works on.
// Included by units compiled with wider instructions: no std:: templates and no inline functions here, since the
// linker might keep a copy of them that the baseline CPU cannot run.
#pragma once

#include <stdint.h>

#include "core/attention.hpp"
#include "core/gather_mlp.hpp"

namespace emoe::cpu {

constexpr int kNarrowRows = 8;     // up to this many rows of an expert: streamed as dot products (docs/kernels.md)
constexpr int kEncodedRows = 16;   // the same for experts whose weights are encoded
constexpr int kMostEncoded = 32;   // the most that Kernels::encoded_rows may be
constexpr int kWideRows = 256;     // rows of one wide chunk: what phase one keeps in L2
constexpr int kSubBlock = 64;      // weight rows of one wide tile
constexpr int kNarrowBlock = 512;  // most weight rows of one narrow task
constexpr int kRowPad = 16;        // narrow rows are zero-padded to a multiple of this
constexpr int kEncodedPad = 256;   // the same for rows that meet encoded weights
constexpr int kOrders = 5;         // of 16-bit integers that such a row is held in (encoded_x.inl)
// Units of one such row: its floats, its integers in each order, a scale, a sum and that of the first half of each 32,
// its floats in the order of bytes that are looked up, and so many more that rows lie on lines of the cache.
// `static`: every unit keeps its own.
static constexpr int64_t encoded_stride(int64_t depth) {
    return (depth + kEncodedPad - 1) / kEncodedPad * (2 * kEncodedPad + kOrders * kEncodedPad / 2 + kEncodedPad / 8);
}

// Some rows of one expert. `x` and `h` are scratch of 32-bit units:
// narrow: float [rows][round_up(K, kRowPad)]; wide: panels of up to 2*lanes rows, each [units][panel rows];
// narrow of encoded experts: csrc/cpu/encoded_x.inl.
struct Chunk {
    const unsigned char* slot;
    const int64_t* token;    // [rows] row of `hidden`
    const int64_t* out_row;  // [rows] row of `out`
    const float* weight;     // [rows] routing weight
    int rows;
    int padded;  // wide: rows rounded up to lanes
    bool wide;
    uint32_t* x;
    uint32_t* h;
};

struct Job {
    const MlpLayout* layout;
    const void* hidden;
    DType hidden_dtype;
    float* out;
    bool accumulate;
    bool pairs;  // wide units hold two bf16 (vdpbf16ps) instead of one float
};

// Where a linear layer's outputs go.
struct LinearOut {
    void* y;           // rows of layout->gate.count, in the dtype of `hidden`
    const void* bias;  // null: none
    DType bias_dtype;
};

constexpr int64_t kAttentionKeys = 256;  // keys of one part of an attention
constexpr int64_t kHeadPad = 16;         // heads in scratch are zero-padded to a multiple of this

// An attention that runs. A set is a head of keys and values of a sequence with its group of queries; scratch in
// floats.
struct AttentionWork {
    const Attention* op;
    int64_t parts;         // of the keys
    int64_t query_stride;  // of one head
    int64_t sum_stride;
    float* queries;  // [sets][group][query_stride], scaled
    float* scores;   // [sets][parts][group][kAttentionKeys]
    float* sums;     // [sets][parts][group][sum_stride]: largest score, sum of weights, weighted sum of values
};

// Groups of numbers whose scales are searched for (emoe/model/encode.py).
struct FitGroups {
    const float* numbers;  // [groups][size]
    int64_t size;
    int most;        // affine: codes from 0 to `most`; symmetric: -most to most - 1
    float first;     // affine: the range is stretched over `most + first` levels and more
    int steps;       // affine: in so many steps of a tenth
    bool squared;    // symmetric: numbers weigh their square; otherwise all the same
    float* scratch;  // kFitScratch * size * lanes
    float* scale;    // [groups]
    float* offset;   // [groups], affine: scale * code - offset is near the number
};
constexpr int kFitScratch = 3;

struct Kernels {
    const char* name;
    int lanes;
    int encoded_rows;  // kEncodedRows where whole numbers multiply all matrices: up to here no slower than tiles are
    bool bf16_pairs;   // has the pair form of the wide path
    void (*load_rows)(const Job&, const Chunk&, int64_t k0,
                      int64_t k1);  // k0 and k1 (unless the end) divide by kSubBlock
    void (*gate_up)(const Job&, const Chunk&, int64_t i0, int64_t i1);                      // h columns [i0,i1)
    void (*down)(const Job&, const Chunk&, int64_t n0, int64_t n1);                         // out columns [n0,n1)
    void (*linear)(const Job&, const Chunk&, const LinearOut&, int64_t n0, int64_t n1);     // at most kSubBlock, narrow
                                                                                            // kNarrowBlock, of `gate`
    void (*combine)(const float* pairs, int64_t top_k, int64_t n, void* out, DType dtype);  // one token
    void (*attend_load)(const AttentionWork&, int64_t set);
    void (*attend)(const AttentionWork&, int64_t set, int64_t part);
    void (*attend_store)(const AttentionWork&, int64_t set);
    void (*rms_norm)(const RmsNorm&, int64_t row);
    void (*fit_affine)(const FitGroups&, int64_t group, int count);  // of at most `lanes` groups
    void (*fit_symmetric)(const FitGroups&, int64_t group, int count);
    float (*read)(const void* data, int64_t bytes);  // loads every byte: the memory bandwidth measure
};

extern const Kernels kScalarKernels;
#if defined(__x86_64__)
extern const Kernels kAvx2Kernels;
extern const Kernels kAvx512Kernels;
extern const Kernels kAvx512Bf16Kernels;
#endif

}  // namespace emoe::cpu
