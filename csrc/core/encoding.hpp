// How many bytes a weight has: an array [rows, cols] is cut into equal blocks, and a block has so many bytes. The one
// place that says it; another format is a row here and a body in csrc/cpu (and csrc/cuda).
#pragma once

#include <cstdint>
#include <string_view>

#include "core/codes.hpp"
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

// Which arrays the codes lie in.
enum class CodesIn : std::uint8_t {
    kValues,   // "values": a number each
    kBlocks,   // "blocks": along a row, scales among the codes
    kBytes,    // "codes", one byte each, and "scales"
    kNibbles,  // "codes", two in a byte along a row, "scales", and "factor" with scales of e4m3
    kWords,    // "codes", eight in an int32 along a row, "scales", "zeros" or none
    kColumns,  // "codes", "scales" and "zeros" with a row for each (group of) input
};

struct CodesRow {
    Codes codes;
    std::string_view name;
    CodesIn in;
    int values;  // of a block, along a row (kColumns: along the inputs)
    int bytes;   // of a block
};

inline constexpr CodesRow kCodes[] = {
    {Codes::kFloat32, "float32", CodesIn::kValues, 1, 4},
    {Codes::kFloat16, "float16", CodesIn::kValues, 1, 2},
    {Codes::kBFloat16, "bfloat16", CodesIn::kValues, 1, 2},
    {Codes::kE4M3, "e4m3", CodesIn::kBytes, 1, 1},
    {Codes::kE5M2, "e5m2", CodesIn::kBytes, 1, 1},
    {Codes::kInt8, "int8", CodesIn::kBytes, 1, 1},
    {Codes::kUInt8B128, "uint8b128", CodesIn::kBytes, 1, 1},
    {Codes::kE2M1, "e2m1", CodesIn::kNibbles, 2, 1},
    {Codes::kE2M1Divided, "e2m1_divided", CodesIn::kNibbles, 2, 1},
    {Codes::kInt4, "int4", CodesIn::kWords, 8, 4},
    {Codes::kAwq, "awq", CodesIn::kColumns, 1, 4},
    {Codes::kGptq, "gptq", CodesIn::kColumns, 8, 4},
    {Codes::kGptqV2, "gptq_v2", CodesIn::kColumns, 8, 4},
    {Codes::kQ8_0, "q8_0", CodesIn::kBlocks, 32, 34},
    {Codes::kQ4_0, "q4_0", CodesIn::kBlocks, 32, 18},
    {Codes::kQ4_1, "q4_1", CodesIn::kBlocks, 32, 20},
    {Codes::kQ5_0, "q5_0", CodesIn::kBlocks, 32, 22},
    {Codes::kQ5_1, "q5_1", CodesIn::kBlocks, 32, 24},
    {Codes::kQ2_K, "q2_k", CodesIn::kBlocks, 256, 84},
    {Codes::kQ3_K, "q3_k", CodesIn::kBlocks, 256, 110},
    {Codes::kQ4_K, "q4_k", CodesIn::kBlocks, 256, 144},
    {Codes::kQ5_K, "q5_k", CodesIn::kBlocks, 256, 176},
    {Codes::kQ6_K, "q6_k", CodesIn::kBlocks, 256, 210},
    {Codes::kIq1S, "iq1_s", CodesIn::kBlocks, 256, 50},
    {Codes::kIq1M, "iq1_m", CodesIn::kBlocks, 256, 56},
    {Codes::kIq2Xxs, "iq2_xxs", CodesIn::kBlocks, 256, 66},
    {Codes::kIq2Xs, "iq2_xs", CodesIn::kBlocks, 256, 74},
    {Codes::kIq2S, "iq2_s", CodesIn::kBlocks, 256, 82},
    {Codes::kIq3Xxs, "iq3_xxs", CodesIn::kBlocks, 256, 98},
    {Codes::kIq3S, "iq3_s", CodesIn::kBlocks, 256, 110},
    {Codes::kIq4Nl, "iq4_nl", CodesIn::kBlocks, 32, 18},
    {Codes::kIq4Xs, "iq4_xs", CodesIn::kBlocks, 256, 136},
    {Codes::kMxfp4Blocks, "gguf_mxfp4", CodesIn::kBlocks, 32, 17},
};

constexpr const CodesRow& codes_row(Codes codes) { return kCodes[static_cast<int>(codes)]; }

}  // namespace emoe
