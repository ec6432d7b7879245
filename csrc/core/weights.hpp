// One weight matrix of an expert as it lies in a slot, in any encoding: what emoe/model/layout.py says of it.
// Knows bytes and sizes only; csrc/cpu/expand.hpp gives the numbers.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>

#include "core/codes.hpp"
#include "core/dtype.hpp"
#include "core/encoding.hpp"

namespace emoe {

// Both throw ConfigError naming the choices.
Codes parse_codes(std::string_view name);
ScaleType parse_scale(std::string_view name);
std::string_view scale_name(ScaleType scale);
int scale_bytes(ScaleType scale);

// `rows` by `depth` weights lie there, outputs by inputs; row r of the matrix meant is row first + r * step of them.
// Offsets in bytes from the start of a slot, -1: no such array. No alignment is asked for.
struct Weights {
    Codes codes = Codes::kFloat32;
    std::int64_t rows = 0;
    std::int64_t depth = 0;
    std::int64_t first = 0;
    std::int64_t step = 1;
    std::int64_t count = 0;
    std::int64_t data = -1;  // "values", "blocks" or "codes"
    std::int64_t scales = -1;
    std::int64_t zeros = -1;
    std::int64_t factor = -1;
    ScaleType scale = ScaleType::kNone;
    std::int64_t scale_rows = 0;  // of the weights that share a scale; 0: all there are
    std::int64_t scale_cols = 0;
    std::int64_t bias = -1;  // of the first row
    std::int64_t bias_step = 1;
    DType bias_dtype = DType::kFloat32;
};

// Sets the offset of a plane by name; ConfigError where there is no such plane.
void set_plane(Weights& weights, std::string_view plane, std::int64_t offset);

// ConfigError where sizes, offsets and codes contradict each other; `name` stands for the matrix in the message.
void validate(const Weights& weights, const std::string& name);

// The byte after the last one that belongs to any array.
std::int64_t extent(const Weights& weights);

}  // namespace emoe
