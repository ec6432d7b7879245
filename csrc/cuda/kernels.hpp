// The GPU kernels as host functions: each only enqueues on the stream it is given and never waits for the device, so
// every sequence of them can be captured into a CUDA graph. Not the backend: streams, copies and slots are
// cuda_backend.hpp. All addresses below are device addresses unless said otherwise.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>

#include "core/gather_mlp.hpp"

namespace emoe::cuda {

// How gather_mlp computes a call. Chosen from sizes the host knows, so that a row's bits do not depend on how experts
// are spread over calls.
enum class Path : std::uint8_t {
    kRows,   // few tokens: reads each weight once, 16 bytes a load, fp32 throughout
    kTiles,  // many tokens: tensor cores; hidden states and activations are rounded to the weights' dtype, weights
             // that are encoded to that of the hidden states
};

// One call. `slot_of` is read on the device when the kernels run: changing its contents between replays of a captured
// graph is allowed, changing any address or size is not.
struct Mlp {
    MlpLayout layout;
    const std::byte* slab = nullptr;  // 16-byte aligned
    std::int64_t slot_bytes = 0;
    const std::int32_t* slot_of = nullptr;  // [E]; -1: the expert takes no part in this call
    std::int64_t experts = 0;               // E
    const void* hidden = nullptr;           // [T,H] hidden_dtype: float32, float16, bfloat16
    DType hidden_dtype = DType::kFloat32;
    std::int64_t tokens = 0;              // T
    const std::int64_t* index = nullptr;  // [T,C]; outside 0..E-1: skipped
    const void* weights = nullptr;        // [T,C] weights_dtype: float32, float16, bfloat16
    DType weights_dtype = DType::kFloat32;
    std::int64_t top_k = 0;  // K
    float* out = nullptr;    // [T,K,Ho], zero before the first call; written at (t, rank of the expert among the K ids)

    // Resident mode, on the device: with C > K, `index` and `weights` hold each token's C best experts, best first,
    // and the K picks are the first K of them that have a slot (fewer where fewer have one).
    std::int64_t candidates = 0;   // C; 0 means K: every id is a pick, and those without a slot wait for another call
    bool keep_mass = false;        // scale a token's picked weights so that they sum to its first K weights
    float* substituted = nullptr;  // [T] or null: share of the first K weights that lay on experts without a slot
};

// "" where gather_mlp takes the layout, else the reason, naming the value that is in the way.
std::string refusal(const MlpLayout& layout);
bool supports(const MlpLayout& layout) noexcept;

// True where tensor cores can serve the layout: bf16 or fp16, sizes and offsets in multiples of 16 bytes; or encoded
// (for hidden states of 16 bits).
// Others run on the rows path however many tokens there are.
bool tiles_possible(const MlpLayout& layout, std::int64_t slot_bytes) noexcept;
Path path_of(const Mlp& op) noexcept;

// Bytes that `workspace` below needs: a function of sizes, dtypes and the alignment of `hidden`. 256-byte aligned
// memory. It is scratch of one call: calls that may overlap in time need one each.
std::size_t workspace_bytes(const Mlp& op);

// The slot table of a layer, for the calls that `stream` gets next. It travels as parameters of kernels: no copy is
// made, and `slot_of` is free when this returns. TransferError where a launch fails.
void write_table(std::span<const std::int32_t> slot_of, std::int32_t* table, cudaStream_t stream);

// Sorts the pairs by expert on the device (ties by position) and lists the tiles; writes into `workspace`.
void route(const Mlp& op, void* workspace, cudaStream_t stream);

// w[t,k] * mlp_e(x[t]) for every pair whose expert has a slot, in docs/kernels.md's order. `route` of the same op
// with the same workspace comes before it on the stream.
// Both: ConfigError where the op contradicts itself or the layout is refused, TransferError where a launch fails.
void gather_mlp(const Mlp& op, void* workspace, cudaStream_t stream);

// out[t] = sum over ranks k, ascending, of pairs[t][k]; rounded once to out_dtype. `add` (float32 only) adds the sum to
// what `out` holds.
void combine(const float* pairs, std::int64_t tokens, std::int64_t top_k, std::int64_t hidden_out, void* out,
             DType out_dtype, bool add, cudaStream_t stream);

}  // namespace emoe::cuda
