#include "core/gather_mlp.hpp"

#include <algorithm>
#include <string>
#include <utility>

#include "core/encoding.hpp"
#include "core/error.hpp"

namespace emoe {
namespace {

constexpr std::pair<Activation, std::string_view> kActivations[] = {
    {Activation::kSilu, "silu"},
    {Activation::kGelu, "gelu"},
    {Activation::kGeluTanh, "gelu_tanh"},
    {Activation::kRelu, "relu"},
    {Activation::kRelu2, "relu2"},
    {Activation::kIdentity, "identity"},
    {Activation::kSwigluClamped, "swiglu_clamped"},
    {Activation::kSiluClamped, "silu_clamped"},
};

constexpr std::int64_t kMostElements = std::int64_t{1} << 40;  // keeps every product of two sizes inside int64

[[noreturn]] void refuse(std::string message) { throw Error(ErrorKind::kConfig, std::move(message)); }

void require_positive(const char* name, std::int64_t value) {
    if (value < 1) refuse(std::string(name) + "=" + std::to_string(value) + ": must be at least 1");
    if (value > 1 << 24)
        refuse(std::string(name) + "=" + std::to_string(value) + ": above 2^24 is taken for a mistake");
}

void require_float(const char* name, DType dtype) {
    std::string choices;
    for (const Encoding& each : kEncodings) {
        if (each.name == dtype_name(dtype)) return;
        choices += (choices.empty() ? "" : ", ") + std::string(each.name);
    }
    refuse(std::string(name) + " '" + std::string(dtype_name(dtype)) + "' is not one of: " + choices);
}

struct Part {
    const char* name;
    std::int64_t offset;
    std::int64_t rows;
    std::int64_t cols;
};

// The tensors of one expert; a missing bias has offset -1.
void fill_parts(const MlpLayout& a, Part (&parts)[4]) {
    const std::int64_t rows = (a.has_gate ? 2 : 1) * a.intermediate;
    parts[0] = {"gate_up_offset", a.gate_up_offset, rows, a.hidden};
    parts[1] = {"gate_up_bias_offset", a.gate_up_bias_offset, 1, rows};
    parts[2] = {"down_offset", a.down_offset, a.hidden_out, a.intermediate};
    parts[3] = {"down_bias_offset", a.down_bias_offset, 1, a.hidden_out};
}

void require_equal(const std::string& what, std::int64_t value, const char* size, std::int64_t its_value) {
    if (value == its_value) return;
    refuse(what + "=" + std::to_string(value) + ", but " + size + "=" + std::to_string(its_value));
}

void validate_encoded(const MlpLayout& a) {
    validate(a.gate, "gate");
    require_equal("gate: count", a.gate.count, "intermediate", a.intermediate);
    require_equal("gate: depth", a.gate.depth, "hidden", a.hidden);
    if (a.has_gate) {
        validate(a.up, "up");
        require_equal("up: count", a.up.count, "intermediate", a.intermediate);
        require_equal("up: depth", a.up.depth, "hidden", a.hidden);
    }
    validate(a.down, "down");
    require_equal("down: count", a.down.count, "hidden_out", a.hidden_out);
    require_equal("down: depth", a.down.depth, "intermediate", a.intermediate);
}

}  // namespace

Activation parse_activation(std::string_view name) {
    std::string choices;
    for (const auto& [activation, its_name] : kActivations) {
        if (its_name == name) return activation;
        choices += (choices.empty() ? "" : ", ") + std::string(its_name);
    }
    refuse("activation '" + std::string(name) + "' is not one of: " + choices);
}

std::string_view activation_name(Activation activation) {
    return kActivations[static_cast<std::size_t>(activation)].second;
}

OutMode parse_out_mode(std::string_view name) {
    if (name == "pairs") return OutMode::kPairs;
    if (name == "accumulate") return OutMode::kAccumulate;
    refuse("mode '" + std::string(name) + "' is not one of: pairs, accumulate");
}

void validate(const MlpLayout& layout) {
    require_positive("hidden", layout.hidden);
    require_positive("intermediate", layout.intermediate);
    require_positive("hidden_out", layout.hidden_out);
    if (layout.interleaved && !layout.has_gate) refuse("interleaved=True needs has_gate=True");
    const bool clamped =
        layout.activation == Activation::kSwigluClamped || layout.activation == Activation::kSiluClamped;
    const std::string name(activation_name(layout.activation));
    if (clamped && !layout.has_gate) refuse("activation '" + name + "' needs has_gate=True");
    if (clamped && !(layout.limit > 0.0F)) refuse("activation '" + name + "' needs limit > 0");
    if (layout.encoded) return validate_encoded(layout);
    Part parts[4];
    fill_parts(layout, parts);
    for (int p = 0; p < 4; ++p) {
        const bool optional = p % 2 == 1;
        const std::int64_t offset = parts[p].offset;
        if (offset < (optional ? -1 : 0) || offset > kMostElements) {
            refuse(std::string(parts[p].name) + "=" + std::to_string(offset) + ": not an offset into a slot");
        }
    }
}

std::int64_t slot_extent(const MlpLayout& layout) {
    if (layout.encoded) {
        const std::int64_t both = std::max(extent(layout.gate), extent(layout.down));
        return layout.has_gate ? std::max(both, extent(layout.up)) : both;
    }
    Part parts[4];
    fill_parts(layout, parts);
    const Encoding encoding = encoding_of(layout.dtype);
    std::int64_t extent = 0;
    for (const Part& part : parts) {
        if (part.offset >= 0) extent = std::max(extent, part.offset + encoding.nbytes(part.rows, part.cols));
    }
    return extent;
}

void validate(const GatherMlp& op) {
    validate(op.layout);
    if (!op.layout.encoded) require_float("the layout's dtype", op.layout.dtype);
    require_float("hidden_dtype", op.hidden_dtype);
    require_float("weights_dtype", op.weights_dtype);
    if (op.tokens < 0) refuse("tokens=" + std::to_string(op.tokens) + ": must be at least 0");
    if (op.top_k < 1) refuse("top_k=" + std::to_string(op.top_k) + ": must be at least 1");
    if (op.tokens > kMostElements / op.top_k) refuse("tokens * top_k is taken for a mistake");
    const std::int64_t extent = slot_extent(op.layout);
    if (op.slot_bytes < extent) {
        refuse("an expert of this layout reaches to byte " + std::to_string(extent) + ", but slots have " +
               std::to_string(op.slot_bytes) + " bytes");
    }
    for (std::size_t e = 0; e < op.slot_of.size(); ++e) {
        if (op.slot_of[e] < -1) {
            refuse("slot_of[" + std::to_string(e) + "]=" + std::to_string(op.slot_of[e]) + ": a slot, or -1");
        }
    }
    if (op.tokens == 0) return;
    const std::pair<const char*, const void*> addresses[] = {
        {"slab_address", op.slab},   {"hidden_ptr", op.hidden}, {"index_ptr", op.index},
        {"weights_ptr", op.weights}, {"out_ptr", op.out},
    };
    for (const auto& [its_name, address] : addresses) {
        if (address == nullptr) refuse(std::string(its_name) + " is 0");
    }
}

}  // namespace emoe
