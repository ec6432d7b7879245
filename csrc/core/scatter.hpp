// Copies part of a row-major array out of file bytes into a strided array, converting the element type on the way.
// Source bytes may lie at any address: a checkpoint promises no alignment.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "core/dtype.hpp"
#include "core/encoding.hpp"

namespace emoe {

// Where a [rows, cols] array goes. Strides in elements of dst_dtype.
struct ScatterLayout {
    DType src_dtype = DType::kFloat32;
    DType dst_dtype = DType::kFloat32;
    std::int64_t rows = 0;
    std::int64_t cols = 0;
    std::int64_t row_stride = 0;
    std::int64_t col_stride = 0;
};

// True where the array lands as one run of unchanged bytes.
constexpr bool is_plain_copy(const ScatterLayout& a) {
    return a.src_dtype == a.dst_dtype && (a.col_stride == 1 || a.cols == 1) && (a.row_stride == a.cols || a.rows == 1);
}

constexpr bool can_convert(DType from, DType to) {
    const auto is_float = [](DType a) { return a == DType::kFloat32 || a == DType::kFloat16 || a == DType::kBFloat16; };
    return from == to || (is_float(from) && is_float(to));
}

namespace detail {

template <DType kType>
struct Element;
template <>
struct Element<DType::kFloat32> {
    using Bits = float;
    static float load(float value) { return value; }
    static float store(float value) { return value; }
};
template <>
struct Element<DType::kBFloat16> {
    using Bits = std::uint16_t;
    static float load(std::uint16_t bits) { return bf16_to_float(bits); }
    static std::uint16_t store(float value) { return float_to_bf16(value); }
};
template <>
struct Element<DType::kFloat16> {
    using Bits = std::uint16_t;
    static float load(std::uint16_t bits) { return f16_to_float(bits); }
    static std::uint16_t store(float value) { return float_to_f16(value); }
};

template <DType kFrom, DType kTo>
struct Convert {
    using Src = typename Element<kFrom>::Bits;
    using Dst = typename Element<kTo>::Bits;
    static Dst one(Src value) { return Element<kTo>::store(Element<kFrom>::load(value)); }
};
template <typename T>
struct Keep {
    using Src = T;
    using Dst = T;
    static T one(T value) { return value; }
};

// Rows [0, rows) x columns [0, cols) of a source with `src_cols` columns to a row. memcpy, since neither side is
// aligned.
template <typename Op>
void scatter_block(const std::byte* src, std::int64_t src_cols, std::byte* dst, std::int64_t rows, std::int64_t cols,
                   std::int64_t row_stride, std::int64_t col_stride) {
    using Src = typename Op::Src;
    using Dst = typename Op::Dst;
    constexpr std::int64_t kIn = sizeof(Src);
    constexpr std::int64_t kOut = sizeof(Dst);
    const auto run = [](const std::byte* from, std::int64_t from_stride, std::byte* to, std::int64_t to_stride,
                        std::int64_t count) {
        for (std::int64_t i = 0; i < count; ++i) {
            Src value;
            std::memcpy(&value, from + i * from_stride, kIn);
            const Dst result = Op::one(value);
            std::memcpy(to + i * to_stride, &result, kOut);
        }
    };
    if (col_stride == 1) {
        for (std::int64_t r = 0; r < rows; ++r) {
            run(src + r * src_cols * kIn, kIn, dst + r * row_stride * kOut, kOut, cols);
        }
        return;
    }
    // Tiles keep both the rows read and the columns written in cache when the array is transposed.
    constexpr std::int64_t kTile = 64;
    for (std::int64_t r = 0; r < rows; r += kTile) {
        for (std::int64_t c = 0; c < cols; c += kTile) {
            const std::int64_t last = std::min(c + kTile, cols);
            for (std::int64_t column = c; column < last; ++column) {
                run(src + (r * src_cols + column) * kIn, src_cols * kIn,
                    dst + (r * row_stride + column * col_stride) * kOut, row_stride * kOut, std::min(kTile, rows - r));
            }
        }
    }
}

// Elements [first, first + count) in row-major order: a part of a row, whole rows, a part of a row.
template <typename Op>
void scatter_range(const ScatterLayout& a, std::int64_t first, std::int64_t count, const std::byte* src,
                   std::byte* dst) {
    while (count > 0) {
        const std::int64_t row = first / a.cols;
        const std::int64_t col = first % a.cols;
        const bool whole = col == 0 && count >= a.cols;
        const std::int64_t rows = whole ? count / a.cols : 1;
        const std::int64_t cols = whole ? a.cols : std::min(a.cols - col, count);
        std::byte* to =
            dst + (row * a.row_stride + col * a.col_stride) * static_cast<std::int64_t>(sizeof(typename Op::Dst));
        scatter_block<Op>(src, a.cols, to, rows, cols, a.row_stride, a.col_stride);
        src += rows * cols * static_cast<std::int64_t>(sizeof(typename Op::Src));
        first += rows * cols;
        count -= rows * cols;
    }
}

}  // namespace detail

// Writes elements [first, first + count) of the array, which lie at `src`, to where they belong in the array at `dst`.
inline void scatter(const ScatterLayout& a, std::int64_t first, std::int64_t count, const std::byte* src,
                    std::byte* dst) {
    using enum DType;
    const auto pair = [](DType from, DType to) { return static_cast<int>(from) * 256 + static_cast<int>(to); };
    if (is_plain_copy(a)) {
        const Encoding encoding = encoding_of(a.src_dtype);
        std::memcpy(dst + encoding.nbytes(first), src, static_cast<std::size_t>(encoding.nbytes(count)));
        return;
    }
    if (a.src_dtype == a.dst_dtype) {
        switch (encoding_of(a.src_dtype).bytes) {
            case 1:
                return detail::scatter_range<detail::Keep<std::uint8_t>>(a, first, count, src, dst);
            case 2:
                return detail::scatter_range<detail::Keep<std::uint16_t>>(a, first, count, src, dst);
            case 4:
                return detail::scatter_range<detail::Keep<std::uint32_t>>(a, first, count, src, dst);
            default:
                return detail::scatter_range<detail::Keep<std::uint64_t>>(a, first, count, src, dst);
        }
    }
    const int conversion = pair(a.src_dtype, a.dst_dtype);
    if (conversion == pair(kFloat32, kBFloat16)) {
        detail::scatter_range<detail::Convert<kFloat32, kBFloat16>>(a, first, count, src, dst);
    } else if (conversion == pair(kFloat32, kFloat16)) {
        detail::scatter_range<detail::Convert<kFloat32, kFloat16>>(a, first, count, src, dst);
    } else if (conversion == pair(kBFloat16, kFloat32)) {
        detail::scatter_range<detail::Convert<kBFloat16, kFloat32>>(a, first, count, src, dst);
    } else if (conversion == pair(kBFloat16, kFloat16)) {
        detail::scatter_range<detail::Convert<kBFloat16, kFloat16>>(a, first, count, src, dst);
    } else if (conversion == pair(kFloat16, kFloat32)) {
        detail::scatter_range<detail::Convert<kFloat16, kFloat32>>(a, first, count, src, dst);
    } else {
        detail::scatter_range<detail::Convert<kFloat16, kBFloat16>>(a, first, count, src, dst);
    }
}

}  // namespace emoe
