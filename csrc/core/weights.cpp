#include "core/weights.hpp"

#include <algorithm>
#include <iterator>
#include <utility>

#include "core/error.hpp"

namespace emoe {
namespace {

constexpr std::int64_t kMostBytes = std::int64_t{1} << 40;
constexpr std::int64_t kMostSize = std::int64_t{1} << 24;

struct ScaleRow {
    ScaleType scale;
    std::string_view name;
    int bytes;
};
constexpr ScaleRow kScales[] = {
    {ScaleType::kNone, "", 0},           {ScaleType::kFloat32, "float32", 4}, {ScaleType::kBFloat16, "bfloat16", 2},
    {ScaleType::kFloat16, "float16", 2}, {ScaleType::kE8M0, "e8m0", 1},       {ScaleType::kE4M3, "e4m3", 1},
};

[[noreturn]] void refuse(std::string message) { throw Error(ErrorKind::kConfig, std::move(message)); }

template <typename Table>
std::string choices(const Table& table) {
    std::string names;
    for (const auto& row : table) names += (names.empty() ? "'" : ", '") + std::string(row.name) + "'";
    return names;
}

std::int64_t blocks(std::int64_t n, std::int64_t size) { return size == 0 ? 1 : (n + size - 1) / size; }

struct Array {
    const char* name;
    std::int64_t offset;
    std::int64_t bytes;
    bool needed;
    bool allowed;
};

// What the arrays of these codes are.
void fill_arrays(const Weights& w, Array (&arrays)[4]) {
    const CodesRow& row = codes_row(w.codes);
    const std::int64_t groups = blocks(w.depth, w.scale_cols);
    const bool scaled = row.in != CodesIn::kValues && row.in != CodesIn::kBlocks;
    const char* data = row.in == CodesIn::kValues ? "values" : row.in == CodesIn::kBlocks ? "blocks" : "codes";
    std::int64_t codes = w.rows * blocks(w.depth, row.values) * row.bytes;
    if (w.codes == Codes::kAwq) codes = w.depth * (w.rows / 8) * 4;
    const std::int64_t scale_rows = row.in == CodesIn::kBytes ? blocks(w.rows, w.scale_rows) : w.rows;
    const std::int64_t scales = scale_rows * groups * scale_bytes(w.scale);
    const bool zeros = row.in == CodesIn::kColumns;
    const bool factor = row.in == CodesIn::kNibbles && w.scale == ScaleType::kE4M3;
    arrays[0] = {data, w.data, codes, true, true};
    arrays[1] = {"scales", w.scales, scales, scaled, scaled};
    arrays[2] = {"zeros", w.zeros, blocks(w.rows, 8) * groups * 4, zeros, zeros || row.in == CodesIn::kWords};
    arrays[3] = {"factor", w.factor, 4, factor, row.in == CodesIn::kNibbles};
}

void require_size(const std::string& name, const char* what, std::int64_t value, std::int64_t least) {
    if (value < least || value > kMostSize) {
        refuse(name + ": " + what + "=" + std::to_string(value) + " is not " + std::to_string(least) + " to 2^24");
    }
}

void require_multiple(const std::string& name, const char* what, std::int64_t value, std::int64_t unit,
                      std::string_view codes) {
    if (unit > 0 && value % unit != 0) {
        refuse(name + ": " + what + "=" + std::to_string(value) + " is no multiple of " + std::to_string(unit) +
               ", as " + std::string(codes) + " needs");
    }
}

}  // namespace

Codes parse_codes(std::string_view name) {
    for (const CodesRow& row : kCodes) {
        if (row.name == name) return row.codes;
    }
    refuse("codes '" + std::string(name) + "' are not one of: " + choices(kCodes));
}

ScaleType parse_scale(std::string_view name) {
    for (const ScaleRow& row : kScales) {
        if (row.name == name) return row.scale;
    }
    refuse("scale '" + std::string(name) + "' is not one of: " + choices(kScales));
}

std::string_view scale_name(ScaleType scale) { return kScales[static_cast<std::size_t>(scale)].name; }
int scale_bytes(ScaleType scale) { return kScales[static_cast<std::size_t>(scale)].bytes; }

void set_plane(Weights& weights, std::string_view plane, std::int64_t offset) {
    const std::pair<std::string_view, std::int64_t Weights::*> members[] = {
        {"values", &Weights::data},   {"blocks", &Weights::data}, {"codes", &Weights::data},
        {"scales", &Weights::scales}, {"zeros", &Weights::zeros}, {"factor", &Weights::factor},
    };
    for (const auto& [name, member] : members) {
        if (name != plane) continue;
        weights.*member = offset;
        return;
    }
    refuse("plane '" + std::string(plane) + "' is not one of: values, blocks, codes, scales, zeros, factor");
}

void validate(const Weights& w, const std::string& name) {
    const CodesRow& row = codes_row(w.codes);
    require_size(name, "rows", w.rows, 1);
    require_size(name, "depth", w.depth, 1);
    require_size(name, "count", w.count, 1);
    require_size(name, "first", w.first, 0);
    require_size(name, "step", w.step, 1);
    require_size(name, "scale_block's rows", w.scale_rows, 0);
    require_size(name, "scale_block's columns", w.scale_cols, 0);
    const std::int64_t last = w.first + (w.count - 1) * w.step;
    if (last >= w.rows) {
        refuse(name + ": its last row is " + std::to_string(last) + ", but there are " + std::to_string(w.rows));
    }
    if (row.in == CodesIn::kBlocks || row.in == CodesIn::kNibbles || row.in == CodesIn::kColumns) {
        require_multiple(name, "depth", w.depth, row.values, row.name);
    }
    if (row.in == CodesIn::kColumns) require_multiple(name, "rows", w.rows, 8, row.name);
    if (row.in == CodesIn::kColumns || row.in == CodesIn::kNibbles) {
        require_multiple(name, "depth", w.depth, w.scale_cols, "a whole number of groups");
    }
    Array arrays[4];
    fill_arrays(w, arrays);
    for (const Array& array : arrays) {
        const std::string what =
            name + ": codes '" + std::string(row.name) + "' with scale '" + std::string(scale_name(w.scale)) + "'";
        if (array.offset < -1 || array.offset > kMostBytes) {
            refuse(name + ": plane '" + array.name + "' at " + std::to_string(array.offset) +
                   " is not an offset into a slot");
        }
        if (array.needed && array.offset < 0) refuse(what + " need the plane '" + array.name + "'");
        if (!array.allowed && array.offset >= 0) refuse(what + " have no plane '" + array.name + "'");
    }
    if ((w.scales >= 0) != (w.scale != ScaleType::kNone)) {
        refuse(name + ": codes '" + std::string(row.name) + "' do not go with scale '" +
               std::string(scale_name(w.scale)) + "'");
    }
    if (row.in != CodesIn::kBytes && w.scales >= 0 && w.scale_rows != 1) {
        refuse(name + ": codes '" + std::string(row.name) + "' have a scale for each row, not for " +
               std::to_string(w.scale_rows));
    }
    const bool bias_is_float =
        w.bias_dtype == DType::kFloat32 || w.bias_dtype == DType::kFloat16 || w.bias_dtype == DType::kBFloat16;
    if (w.bias >= 0 && !bias_is_float) {
        refuse(name + ": a bias of " + std::string(dtype_name(w.bias_dtype)) +
               " is not one of: float32, float16, bfloat16");
    }
    if (w.bias < -1 || w.bias > kMostBytes) {
        refuse(name + ": bias at " + std::to_string(w.bias) + " is not an offset into a slot");
    }
    if (w.bias >= 0) require_size(name, "the bias's step", w.bias_step, 1);
}

std::int64_t extent(const Weights& w) {
    Array arrays[4];
    fill_arrays(w, arrays);
    std::int64_t end = 0;
    for (const Array& array : arrays) {
        if (array.offset >= 0) end = std::max(end, array.offset + array.bytes);
    }
    if (w.bias >= 0) end = std::max(end, w.bias + ((w.count - 1) * w.bias_step + 1) * itemsize(w.bias_dtype));
    return end;
}

}  // namespace emoe
