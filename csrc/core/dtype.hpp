// Element types by name, and the two narrow floating-point formats as conversions of single values.
// Bulk conversion while scattering is csrc/core/scatter.hpp.
#pragma once

#include <bit>
#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

#include "core/error.hpp"

namespace emoe {

enum class DType : std::uint8_t {
    kFloat32,
    kFloat16,
    kBFloat16,
    kFloat64,
    kInt64,
    kInt32,
    kInt16,
    kInt8,
    kUInt8,
    kBool,
    kFloat8E4M3,
    kFloat8E5M2,
};

struct DTypeRow {
    DType dtype;
    std::string_view name;  // torch's name without "torch."
    int itemsize;           // bytes
};

inline constexpr DTypeRow kDTypes[] = {
    {DType::kFloat32, "float32", 4},
    {DType::kFloat16, "float16", 2},
    {DType::kBFloat16, "bfloat16", 2},
    {DType::kFloat64, "float64", 8},
    {DType::kInt64, "int64", 8},
    {DType::kInt32, "int32", 4},
    {DType::kInt16, "int16", 2},
    {DType::kInt8, "int8", 1},
    {DType::kUInt8, "uint8", 1},
    {DType::kBool, "bool", 1},
    {DType::kFloat8E4M3, "float8_e4m3fn", 1},
    {DType::kFloat8E5M2, "float8_e5m2", 1},
};

constexpr int itemsize(DType dtype) { return kDTypes[static_cast<int>(dtype)].itemsize; }
constexpr std::string_view dtype_name(DType dtype) { return kDTypes[static_cast<int>(dtype)].name; }

// Throws ConfigError naming the choices.
inline DType parse_dtype(std::string_view name) {
    std::string choices;
    for (const DTypeRow& row : kDTypes) {
        if (row.name == name) return row.dtype;
        choices += (choices.empty() ? "" : ", ") + std::string(row.name);
    }
    throw Error(ErrorKind::kConfig, "dtype '" + std::string(name) + "' is not one of: " + choices);
}

inline float bf16_to_float(std::uint16_t bits) { return std::bit_cast<float>(static_cast<std::uint32_t>(bits) << 16); }

// Round to nearest even; a NaN stays a NaN (quieted, sign and upper payload kept).
inline std::uint16_t float_to_bf16(float value) {
    const auto bits = std::bit_cast<std::uint32_t>(value);
    if ((bits & 0x7FFFFFFFU) > 0x7F800000U) return static_cast<std::uint16_t>((bits >> 16) | 0x0040U);
    return static_cast<std::uint16_t>((bits + 0x7FFFU + ((bits >> 16) & 1U)) >> 16);
}

inline float f16_to_float(std::uint16_t half) {
    const std::uint32_t sign = static_cast<std::uint32_t>(half & 0x8000U) << 16;
    const std::uint32_t rest = half & 0x7FFFU;
    if (rest >= 0x7C00U) {  // infinity or NaN (quieted)
        const std::uint32_t mantissa = (rest & 0x03FFU) << 13;
        return std::bit_cast<float>(sign | 0x7F800000U | mantissa | (mantissa != 0 ? 0x00400000U : 0U));
    }
    if (rest >= 0x0400U) return std::bit_cast<float>(sign | ((rest << 13) + 0x38000000U));
    const float tiny = static_cast<float>(rest) * 0x1p-24F;  // zero and subnormals are exact multiples of 2^-24
    return std::bit_cast<float>(sign | std::bit_cast<std::uint32_t>(tiny));
}

// Round to nearest even; over 65519.99 becomes infinity; a NaN stays a NaN (quieted).
inline std::uint16_t float_to_f16(float value) {
    const auto bits = std::bit_cast<std::uint32_t>(value);
    const auto sign = static_cast<std::uint16_t>((bits >> 16) & 0x8000U);
    const std::uint32_t rest = bits & 0x7FFFFFFFU;
    if (rest > 0x7F800000U) return static_cast<std::uint16_t>(sign | 0x7E00U | ((rest >> 13) & 0x01FFU));
    if (rest >= 0x477FF000U) return static_cast<std::uint16_t>(sign | 0x7C00U);  // 65520 rounds up to infinity
    if (rest >= 0x38800000U) {                                                   // normal in float16
        const std::uint32_t rounded = rest + 0x0FFFU + ((rest >> 13) & 1U) - 0x38000000U;
        return static_cast<std::uint16_t>(sign | (rounded >> 13));
    }
    // Adding 0.5 lets the FPU round to a multiple of 2^-24, the spacing of subnormal halves.
    const float shifted = std::bit_cast<float>(rest) + 0.5F;
    return static_cast<std::uint16_t>(sign | (std::bit_cast<std::uint32_t>(shifted) - 0x3F000000U));
}

}  // namespace emoe
