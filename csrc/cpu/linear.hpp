// The CPU's linear layer on encoded weights: rows in chunks, and the parallel loops. The arithmetic is linear.inl.
#pragma once

#include <cstddef>
#include <span>

#include "core/linear.hpp"

namespace emoe::cpu {

struct Kernels;

// Up to kNarrowRows tokens at once, each has the bits that it has alone. `kernels` is the active unit unless given.
void linear(const Linear& op);
void linear(const Linear& op, const Kernels& kernels);

// Layers of the same x, of at most kNarrowRows tokens, in one loop: each gives what it gives alone.
constexpr std::size_t kMostAlike = 3;
void narrow_linear(std::span<const Linear> ops, const Kernels& kernels);

}  // namespace emoe::cpu
