// How many bytes a weight has: an array [rows, cols] is cut into equal blocks, and a block has so many bytes. The one
// place that says it; a block format is another row here and a body in csrc/cpu (and csrc/cuda).
#pragma once

#include <cstdint>
#include <string_view>

#include "core/dtype.hpp"

namespace emoe {

struct Encoding {
    std::string_view name;
    std::int64_t rows;   // of a block
    std::int64_t cols;   // of a block
    std::int64_t bytes;  // of a block, over all planes
    int planes;          // arrays that the bytes of a weight lie in: 1, or values and scales apart

    constexpr bool holds(std::int64_t r, std::int64_t c) const { return r % rows == 0 && c % cols == 0; }
    // Of an array that holds() takes.
    constexpr std::int64_t nbytes(std::int64_t r, std::int64_t c) const { return r / rows * (c / cols) * bytes; }
    constexpr std::int64_t blocks(std::int64_t count) const { return count / bytes; }   // whole ones in so many bytes
    constexpr std::int64_t nbytes(std::int64_t count) const { return count * bytes; }   // of so many blocks
    constexpr std::int64_t partial(std::int64_t count) const { return count % bytes; }  // bytes of a block cut in two
};

// One element a block, as every type that the transfer carries has it.
constexpr Encoding encoding_of(DType dtype) { return {dtype_name(dtype), 1, 1, itemsize(dtype), 1}; }

// What the weights of an expert may be encoded in.
inline constexpr Encoding kEncodings[] = {
    encoding_of(DType::kFloat32),
    encoding_of(DType::kFloat16),
    encoding_of(DType::kBFloat16),
};

}  // namespace emoe
