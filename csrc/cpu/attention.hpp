// The CPU's attention of one row and RMSNorm: what runs in parallel. The arithmetic is attention.inl and norm.inl.
#pragma once

#include "core/attention.hpp"

namespace emoe::cpu {

struct Kernels;

// Each sequence has the bits that it has alone, whatever the number of threads. `kernels` is the active unit unless
// given.
void attend(const Attention& op);
void attend(const Attention& op, const Kernels& kernels);

// Each row has the bits that it has alone.
void rms_norm(const RmsNorm& op);
void rms_norm(const RmsNorm& op, const Kernels& kernels);

}  // namespace emoe::cpu
