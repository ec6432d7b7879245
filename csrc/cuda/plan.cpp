#include "cuda/plan.hpp"

#include <algorithm>
#include <initializer_list>
#include <utility>

#include "core/encoding.hpp"
#include "core/error.hpp"

namespace emoe::cuda {
namespace {

constexpr std::int64_t kDecodeTokens =
    8;  // the most tokens of the rows path; unmeasured, docs/cuda.md has the estimate
constexpr std::int64_t kRowsTileRows = 4;
constexpr std::int64_t kTilesTileRows = 64;
constexpr std::int64_t kMostExperts = 8192;     // counted in a block's shared memory
constexpr std::int64_t kMostWidth = 1LL << 24;  // kernels count elements of a row in 32 bits
constexpr std::int64_t kMostPairs = 1LL << 30;  // positions are 32-bit
constexpr std::int64_t kSlotUnit = 16;          // bytes; of slots with encoded experts
constexpr std::size_t kPartAlignment = 256;

bool is_float(DType dtype) { return dtype == DType::kFloat32 || dtype == DType::kFloat16 || dtype == DType::kBFloat16; }

bool all_multiples(std::initializer_list<std::int64_t> values, std::int64_t unit) {
    return std::all_of(values.begin(), values.end(),
                       [&](std::int64_t value) { return value < 0 || value % unit == 0; });
}

// What 16-byte loads of the weights ask of a layout.
bool sixteen_bytes(const MlpLayout& a, std::int64_t slot_bytes) {
    if (!all_multiples({a.gate_up_offset, a.down_offset, slot_bytes}, 16)) return false;
    const std::int64_t unit = 16 / encoding_of(a.dtype).bytes;
    if (!all_multiples({a.hidden, a.intermediate}, unit)) return false;
    return !a.transposed || a.hidden_out % unit == 0;
}

bool aligned(const void* address) { return reinterpret_cast<std::uintptr_t>(address) % 16 == 0; }

[[noreturn]] void refuse(std::string message) { throw Error(ErrorKind::kConfig, std::move(message)); }

void require(bool holds, const char* name, std::int64_t value, const char* rule) {
    if (!holds) refuse(std::string(name) + "=" + std::to_string(value) + ": " + rule);
}

void require_float(const char* name, DType dtype) {
    if (is_float(dtype)) return;
    refuse(std::string(name) + " '" + std::string(dtype_name(dtype)) + "' is not one of: float32, float16, bfloat16");
}

void require_aligned(const char* name, std::int64_t offset, std::int64_t unit) {
    if (offset >= 0) {
        require(offset % unit == 0, name, offset,
                ("must be a multiple of the element's " + std::to_string(unit) + " bytes on a GPU").c_str());
    }
}

// What the eight inputs that a GPU decodes at a time ask of a matrix.
void check_weights(const char* name, const Weights& w) {
    const auto multiple = [&](const std::string& what, std::int64_t value, std::int64_t unit) {
        if (value < 0 || value % unit == 0) return;
        refuse("its " + std::string(name) + " is " + std::string(codes_row(w.codes).name) + " with " + what + " " +
               std::to_string(value) + "; a GPU takes multiples of " + std::to_string(unit));
    };
    if (has_grid(w.codes)) {  // grids are not on the device
        refuse("its " + std::string(name) + " is " + std::string(codes_row(w.codes).name) +
               ", which a GPU's kernels do not decode");
    }
    multiple("rows of length", w.depth, 8);
    multiple("groups of columns of size", w.scale_cols, 8);
    multiple("codes at byte", w.data, kSlotUnit);
    multiple("scales at byte", w.scales, 4);
    multiple("zeros at byte", w.zeros, 4);
    multiple("its factor at byte", w.factor, 4);
    multiple("a bias at byte", w.bias, itemsize(w.bias_dtype));
}

void check_layout(const MlpLayout& layout) {
    validate(layout);
    if (layout.encoded) {
        check_weights("gate", layout.gate);
        if (layout.has_gate) check_weights("up", layout.up);
        return check_weights("down", layout.down);
    }
    require_float("the layout's dtype", layout.dtype);
    const std::pair<const char*, std::int64_t> sizes[] = {
        {"hidden", layout.hidden}, {"intermediate", layout.intermediate}, {"hidden_out", layout.hidden_out}};
    for (const auto& [name, size] : sizes) require(size <= kMostWidth, name, size, "above 2^24 on a GPU");
    const std::int64_t unit = encoding_of(layout.dtype).bytes;
    require_aligned("gate_up_offset", layout.gate_up_offset, unit);
    require_aligned("gate_up_bias_offset", layout.gate_up_bias_offset, unit);
    require_aligned("down_offset", layout.down_offset, unit);
    require_aligned("down_bias_offset", layout.down_bias_offset, unit);
}

}  // namespace

std::string refusal(const MlpLayout& layout) {
    try {
        check_layout(layout);
    } catch (const Error& error) {
        return error.message;
    }
    return "";
}

bool supports(const MlpLayout& layout) noexcept {
    try {
        return refusal(layout).empty();
    } catch (...) {  // out of memory for the message
        return false;
    }
}

bool tiles_possible(const MlpLayout& layout, std::int64_t slot_bytes) noexcept {
    if (layout.encoded) return supports(layout);
    return supports(layout) && encoding_of(layout.dtype).bytes == 2 && sixteen_bytes(layout, slot_bytes);
}

Path path_of(const Mlp& op) noexcept {
    if (op.tokens <= kDecodeTokens || !tiles_possible(op.layout, op.slot_bytes)) return Path::kRows;
    return op.layout.encoded && op.hidden_dtype == DType::kFloat32 ? Path::kRows : Path::kTiles;
}

Plan plan(const Mlp& op) {
    check_layout(op.layout);
    require_float("hidden_dtype", op.hidden_dtype);
    require_float("weights_dtype", op.weights_dtype);
    const std::int64_t extent = slot_extent(op.layout);
    require(op.slot_bytes >= extent, "slot_bytes", op.slot_bytes, "smaller than an expert of this layout");
    if (op.layout.encoded) {
        require(op.slot_bytes % kSlotUnit == 0, "slot_bytes", op.slot_bytes, "must be a multiple of 16 on a GPU");
    } else {
        require(encoding_of(op.layout.dtype).partial(op.slot_bytes) == 0, "slot_bytes", op.slot_bytes,
                "cuts elements in two");
    }
    require(op.experts >= 1 && op.experts <= kMostExperts, "experts", op.experts, "must be 1 to 8192");
    require(op.tokens >= 0, "tokens", op.tokens, "must be at least 0");
    require(op.top_k >= 1, "top_k", op.top_k, "must be at least 1");
    require(op.candidates == 0 || op.candidates >= op.top_k, "candidates", op.candidates,
            "must be 0 or at least top_k");

    Plan made;
    made.candidates = op.candidates == 0 ? op.top_k : op.candidates;
    require(op.tokens <= kMostPairs / made.candidates, "tokens", op.tokens, "tokens * candidates is above 2^30");
    made.path = path_of(op);
    made.pairs = op.tokens * op.top_k;
    made.vector = !op.layout.encoded && sixteen_bytes(op.layout, op.slot_bytes) && aligned(op.hidden);
    made.rows = made.path == Path::kRows ? DType::kFloat32 : op.layout.encoded ? op.hidden_dtype : op.layout.dtype;
    made.narrow = made.path == Path::kTiles ? op.hidden_dtype != made.rows || !aligned(op.hidden)
                                            : op.layout.encoded && !aligned(op.hidden);
    made.tile_rows = made.path == Path::kRows ? kRowsTileRows : kTilesTileRows;
    made.tiles_bound = made.pairs / made.tile_rows + std::min(made.pairs, op.experts);

    std::size_t at = 0;
    const auto place = [&](std::int64_t count, std::size_t size) {
        const std::size_t offset = at;
        at += (static_cast<std::size_t>(count) * size + kPartAlignment - 1) / kPartAlignment * kPartAlignment;
        return offset;
    };
    Parts& parts = made.parts;
    parts.id = place(made.pairs, 4);
    parts.row = place(made.pairs, 4);
    parts.weight = place(made.pairs, 4);
    parts.token = place(made.pairs, 4);
    parts.out_row = place(made.pairs, 4);
    parts.sorted_weight = place(made.pairs, 4);
    parts.tiles = place(made.tiles_bound, 12);
    parts.tile_count = place(1, 4);
    const auto size = static_cast<std::size_t>(itemsize(made.rows));
    parts.activations = place(made.pairs * op.layout.intermediate, size);
    parts.hidden = place(made.narrow ? op.tokens * op.layout.hidden : 0, size);
    parts.bytes = at;
    return made;
}

std::size_t workspace_bytes(const Mlp& op) { return plan(op).parts.bytes; }

}  // namespace emoe::cuda
