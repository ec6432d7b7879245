// Scattering against a loop over single elements: every conversion, any strides, any split, unaligned sources.
#include "core/scatter.hpp"

#include <cmath>
#include <cstring>
#include <random>
#include <vector>

#include "tests/check.hpp"

using namespace emoe;

namespace {

float load(DType dtype, const std::byte* from) {
    std::uint16_t half = 0;
    float whole = 0.0F;
    if (dtype == DType::kFloat32) return std::memcpy(&whole, from, 4), whole;
    std::memcpy(&half, from, 2);
    return dtype == DType::kFloat16 ? f16_to_float(half) : bf16_to_float(half);
}

void store(DType dtype, float value, std::byte* to) {
    const std::uint16_t half = dtype == DType::kFloat16 ? float_to_f16(value) : float_to_bf16(value);
    dtype == DType::kFloat32 ? std::memcpy(to, &value, 4) : std::memcpy(to, &half, 2);
}

}  // namespace

TEST("every dtype pair lands where its strides say, however the array is split") {
    std::mt19937 random(5);
    const DType floats[] = {DType::kFloat32, DType::kBFloat16, DType::kFloat16};
    struct Case {
        DType from, to;
    };
    std::vector<Case> cases = {{DType::kInt8, DType::kInt8},
                               {DType::kInt16, DType::kInt16},
                               {DType::kInt32, DType::kInt32},
                               {DType::kFloat64, DType::kFloat64},
                               {DType::kFloat8E4M3, DType::kFloat8E4M3}};
    for (const DType a : floats) {
        for (const DType b : floats) cases.push_back({a, b});
    }
    for (const auto [from, to] : cases) {
        for (const auto& [rows, cols] : {std::pair{1, 1}, {1, 77}, {77, 1}, {5, 33}, {130, 70}}) {
            const std::int64_t in = itemsize(from), out = itemsize(to);
            const ScatterLayout layouts[] = {
                {from, to, rows, cols, cols, 1},          // as it is
                {from, to, rows, cols, 2 * cols + 3, 1},  // rows apart
                {from, to, rows, cols, 1, rows},          // transposed
                {from, to, rows, cols, 2, 2 * rows + 1},  // transposed and interleaved
                {from, to, rows, cols, 3 * cols, 3},      // every third column
            };
            std::vector<std::byte> source(static_cast<std::size_t>(rows * cols * in + 1));
            for (std::byte& b : source) b = static_cast<std::byte>(random());  // NaN and subnormals among them
            for (const ScatterLayout& a : layouts) {
                const std::int64_t extent = (rows - 1) * a.row_stride + (cols - 1) * a.col_stride + 1;
                std::vector<std::byte> want(static_cast<std::size_t>(extent * out), std::byte{0x77});
                std::vector<std::byte> got = want;
                for (std::int64_t r = 0; r < rows; ++r) {
                    for (std::int64_t c = 0; c < cols; ++c) {
                        const std::byte* value = source.data() + 1 + (r * cols + c) * in;
                        std::byte* place = want.data() + (r * a.row_stride + c * a.col_stride) * out;
                        if (from == to) {
                            std::memcpy(place, value, static_cast<std::size_t>(out));
                        } else {
                            store(to, load(from, value), place);
                        }
                    }
                }
                for (std::int64_t first = 0; first < rows * cols;) {
                    const std::int64_t count = 1 + static_cast<std::int64_t>(random() % (rows * cols - first));
                    scatter(a, first, count, source.data() + 1 + first * in, got.data());
                    first += count;
                }
                CHECK(got == want);
            }
        }
    }
}

TEST("conversions round to nearest even and keep infinities and NaN") {
    const ScatterLayout to_bf16{DType::kFloat32, DType::kBFloat16, 1, 6, 6, 1};
    const std::uint32_t in[] = {0x3F808000, 0x3F818000, 0x3F808001, 0x7F7FFFFF, 0xFF800000, 0x7FC00001};
    const std::uint16_t want[] = {0x3F80, 0x3F82, 0x3F81, 0x7F80, 0xFF80, 0x7FC0};
    std::uint16_t got[6];
    scatter(to_bf16, 0, 6, reinterpret_cast<const std::byte*>(in), reinterpret_cast<std::byte*>(got));
    for (int i = 0; i < 6; ++i) CHECK_EQ(got[i], want[i]);
}

TEST("only the three float types convert into each other") {
    CHECK(can_convert(DType::kFloat16, DType::kFloat32));
    CHECK(can_convert(DType::kInt8, DType::kInt8));
    CHECK(!can_convert(DType::kInt8, DType::kUInt8));
    CHECK(!can_convert(DType::kFloat64, DType::kFloat32));
    CHECK(!can_convert(DType::kFloat8E4M3, DType::kBFloat16));
}

TEST("an encoding says how many bytes a weight has, and which shapes its blocks make up") {
    const std::int64_t sizes[] = {4, 2, 2};
    for (std::size_t i = 0; i < 3; ++i) {
        CHECK_EQ(kEncodings[i].nbytes(3, 5), 15 * sizes[i]);
        CHECK(kEncodings[i].holds(3, 5));
        CHECK_EQ(kEncodings[i].planes, 1);
    }
    CHECK_EQ(encoding_of(DType::kInt64).nbytes(2, 2), 32);
    const Encoding blocks{"blocks", 1, 32, 18, 1};  // 32 elements in 18 bytes, as a block format has them
    CHECK_EQ(blocks.nbytes(3, 64), 3 * 2 * 18);
    CHECK(blocks.holds(3, 64) && !blocks.holds(3, 65));
    CHECK_EQ(blocks.blocks(2 * 18 + 5), 2);
    CHECK_EQ(blocks.partial(2 * 18 + 5), 5);
    const Encoding tiles{"tiles", 128, 128, 128 * 128 + 4, 2};  // values and scales apart
    CHECK_EQ(tiles.nbytes(256, 128), 2 * (128 * 128 + 4));
    CHECK(!tiles.holds(255, 128));
}

EMOE_TEST_MAIN
