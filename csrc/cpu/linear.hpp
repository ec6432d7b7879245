// The CPU's linear layer on encoded weights: rows in chunks, and the parallel loops. The arithmetic is linear.inl.
#pragma once

#include "core/linear.hpp"

namespace emoe::cpu {

struct Kernels;

// Up to kNarrowRows tokens at once, each has the bits that it has alone. `kernels` is the active unit unless given.
void linear(const Linear& op);
void linear(const Linear& op, const Kernels& kernels);

}  // namespace emoe::cpu
