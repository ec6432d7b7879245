// The CPU's gather_mlp: which rows meet which expert, scratch, and the parallel loops. The arithmetic is kernels.inl.
#pragma once

#include <string>
#include <string_view>
#include <vector>

#include "core/gather_mlp.hpp"

namespace emoe::cpu {

struct Kernels;

// Names this build can run on this CPU, best first: "avx512bf16", "avx512", "avx2", "scalar".
std::vector<std::string> available_isas();

// The unit in use: the best one, or EMOE_FORCE_ISA's. ConfigError naming the choices where that is unknown,
// BackendUnavailable where this CPU lacks it. Read once per process.
const Kernels& active_kernels();
// By name, for tests and benchmarks; throws as above.
const Kernels& kernels_named(std::string_view name);

// True where gather_mlp takes the layout; never throws.
bool supports(const MlpLayout& layout) noexcept;

// Most rows of an expert that take the narrow path (docs/kernels.md).
int narrow_rows(const GatherMlp& op, const Kernels& kernels);

// `kernels` is the active unit unless given.
void gather_mlp(const GatherMlp& op);
void gather_mlp(const GatherMlp& op, const Kernels& kernels);

// The pairs of one call and what `combine` makes of them, [tokens, hidden_out] of the dtype of `hidden`. The pairs lie
// in scratch that the thread keeps: for few tokens.
void gather_sum(GatherMlp op, void* out);

// out[t] = sum over ranks k, ascending, of pairs[t][k]; rounded once to out_dtype.
void combine(const float* pairs, std::int64_t tokens, std::int64_t top_k, std::int64_t hidden_out, void* out,
             DType out_dtype);
void combine(const float* pairs, std::int64_t tokens, std::int64_t top_k, std::int64_t hidden_out, void* out,
             DType out_dtype, const Kernels& kernels);

// Seconds of one pass over `bytes` with every thread: the bound that the decode benchmark is compared with.
double read_seconds(const void* data, std::int64_t bytes);

}  // namespace emoe::cpu
