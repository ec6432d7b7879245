// The CPU's decode step of an attention block: linear layers, norms and attention of one row, as they are alone.
#pragma once

#include "core/attention_block.hpp"

namespace emoe::cpu {

struct Kernels;

// Writes the last row of the cache, and y. At most kNarrowRows sequences, each has the bits that it has alone, and that
// its parts give one after the other. `kernels` is the active unit unless given.
void attention_step(const AttentionBlock& block, const AttentionStep& step);
void attention_step(const AttentionBlock& block, const AttentionStep& step, const Kernels& kernels);

}  // namespace emoe::cpu
