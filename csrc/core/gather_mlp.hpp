// The fused expert MLP as data: how one expert lies in a slot, and one call over a batch of routed tokens.
// Knows bytes and sizes only. docs/kernels.md states the arithmetic.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string_view>

#include "core/dtype.hpp"
#include "core/weights.hpp"

namespace emoe {

enum class Activation : std::uint8_t {
    kSilu,
    kGelu,
    kGeluTanh,
    kRelu,
    kRelu2,
    kIdentity,
    kSwigluClamped,
    kSiluClamped,
};

// Throws ConfigError naming the choices.
Activation parse_activation(std::string_view name);
std::string_view activation_name(Activation activation);

// One expert inside a slot. Sizes in elements, offsets in bytes from the start of the slot, -1: no bias.
// gate_up is [2I,H] ([I,H] without gate), or [H,2I] when transposed; down is [Ho,I], or [I,Ho] when transposed.
// Where `encoded`, gate, up (with a gate) and down say it instead: dtype, transposed and the offsets mean nothing, and
// rows are interleaved by the steps of gate and up.
struct MlpLayout {
    std::int64_t hidden = 0;
    std::int64_t intermediate = 0;
    std::int64_t hidden_out = 0;
    DType dtype = DType::kFloat32;
    bool has_gate = true;
    bool interleaved = false;
    bool transposed = false;
    Activation activation = Activation::kSilu;
    float alpha = 1.702F;
    float limit = 0.0F;
    std::int64_t gate_up_offset = 0;
    std::int64_t gate_up_bias_offset = -1;
    std::int64_t down_offset = 0;
    std::int64_t down_bias_offset = -1;
    bool encoded = false;
    Weights gate;
    Weights up;
    Weights down;
};

// ConfigError where the layout contradicts itself (sizes, offsets, flags).
void validate(const MlpLayout& layout);

// Smallest slot that holds every tensor of the layout.
std::int64_t slot_extent(const MlpLayout& layout);

enum class OutMode : std::uint8_t { kPairs, kAccumulate };
OutMode parse_out_mode(std::string_view name);

// One call. slot_of[e] is the slot of expert e, or -1 where the expert takes no part in this call.
struct GatherMlp {
    MlpLayout layout;
    const std::byte* slab = nullptr;
    std::int64_t slot_bytes = 0;
    std::span<const std::int32_t> slot_of;
    const void* hidden = nullptr;  // [T,H] hidden_dtype
    DType hidden_dtype = DType::kFloat32;
    std::int64_t tokens = 0;
    const std::int64_t* index = nullptr;  // [T,K]; outside 0..E-1: skipped
    const void* weights = nullptr;        // [T,K] weights_dtype
    DType weights_dtype = DType::kFloat32;
    std::int64_t top_k = 0;
    float* out = nullptr;  // pairs: [T,K,Ho]; accumulate: [T,Ho]
    OutMode mode = OutMode::kPairs;
};

// ConfigError where an address is missing, a size is negative or the layout does not fit into slot_bytes.
void validate(const GatherMlp& op);

}  // namespace emoe
