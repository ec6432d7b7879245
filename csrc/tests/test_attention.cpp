// Conformance of attention of one row and of RMSNorm: every unit against fp64, and what the bits depend on.
#include <algorithm>
#include <cmath>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "core/parallel.hpp"
#include "cpu/attention.hpp"
#include "cpu/gather_mlp.hpp"
#include "cpu/kernels.hpp"
#include "tests/check.hpp"
#include "tests/kernel_cases.hpp"

using namespace emoe;
using emoe::test::BF16;
using emoe::test::F16;
using emoe::test::F32;

namespace {

using Bytes = std::vector<std::byte>;

double tolerance(DType dtype) { return dtype == F32 ? 1e-5 : dtype == F16 ? 1e-3 : 8e-3; }

template <typename Fn>
void for_each_isa(Fn&& fn) {
    for (const std::string& isa : cpu::available_isas()) fn(cpu::kernels_named(isa));
}

// Rows in buffers with room behind them, which is filled with NaN.
struct Problem {
    std::mt19937 random{7};
    Attention op;
    Bytes query, key, value, out;
    std::vector<unsigned char> mask;

    Problem(DType dtype, std::int64_t batch, std::int64_t heads, std::int64_t kv_heads, std::int64_t keys,
            std::int64_t depth, std::int64_t value_depth, bool masked) {
        op.batch = batch;
        op.heads = heads;
        op.kv_heads = kv_heads;
        op.keys = keys;
        op.depth = depth;
        op.value_depth = value_depth;
        op.dtype = dtype;
        op.scale = 0.3F;
        const std::int64_t room = keys + 3;
        query = numbers(batch * heads * depth, 1.0F);
        key = rows(batch * kv_heads, room, depth);
        value = rows(batch * kv_heads, room, value_depth);
        out.resize(static_cast<std::size_t>(batch * heads * value_depth * itemsize(dtype)));
        op.query = query.data();
        op.key = key.data();
        op.value = value.data();
        op.out = out.data();
        op.query_strides = {heads * depth, depth, 0};
        op.key_strides = {kv_heads * room * depth, room * depth, depth};
        op.value_strides = {kv_heads * room * value_depth, room * value_depth, value_depth};
        if (masked) {
            mask.resize(static_cast<std::size_t>(batch * keys));
            for (unsigned char& each : mask) each = static_cast<unsigned char>(random() % 3 != 0);
            op.mask = mask.data();
            op.mask_strides = {keys, 0, 1};
        }
    }
    Bytes numbers(std::int64_t count, float scale) {
        std::normal_distribution<float> normal(0.0F, scale);
        Bytes made(static_cast<std::size_t>(count * itemsize(op.dtype)));
        for (std::int64_t i = 0; i < count; ++i)
            test::put(made.data() + i * itemsize(op.dtype), op.dtype, normal(random));
        return made;
    }
    Bytes rows(std::int64_t sets, std::int64_t room, std::int64_t depth) {
        Bytes made = numbers(sets * room * depth, 1.0F);
        const float nan = std::numeric_limits<float>::quiet_NaN();
        for (std::int64_t set = 0; set < sets; ++set) {
            for (std::int64_t i = op.keys * depth; i < room * depth; ++i) {
                test::put(made.data() + (set * room * depth + i) * itemsize(op.dtype), op.dtype, nan);
            }
        }
        return made;
    }
    double at(const Bytes& from, std::int64_t i) const {
        return test::value_at(from.data() + i * itemsize(op.dtype), op.dtype);
    }
    const Bytes& run(const cpu::Kernels& kernels) {
        std::fill(out.begin(), out.end(), std::byte{0xFF});
        cpu::attend(op, kernels);
        return out;
    }
    std::vector<double> reference() const {
        std::vector<double> want;
        for (std::int64_t b = 0; b < op.batch; ++b) {
            for (std::int64_t h = 0; h < op.heads; ++h) {
                const std::int64_t kv = h / (op.heads / op.kv_heads);
                std::vector<double> weights;
                double most = -std::numeric_limits<double>::infinity(), total = 0.0;
                for (std::int64_t s = 0; s < op.keys; ++s) {
                    double score = 0.0;
                    for (std::int64_t d = 0; d < op.depth; ++d) {
                        score += at(query, b * op.query_strides.batch + h * op.depth + d) *
                                 at(key, b * op.key_strides.batch + kv * op.key_strides.head + s * op.depth + d);
                    }
                    const bool seen = mask.empty() || mask[static_cast<std::size_t>(b * op.keys + s)] != 0;
                    weights.push_back(seen ? score * 0.3 : -std::numeric_limits<double>::infinity());
                    most = std::max(most, weights.back());
                }
                for (double& each : weights) total += each = std::isinf(each) ? 0.0 : std::exp(each - most);
                for (std::int64_t d = 0; d < op.value_depth; ++d) {
                    double sum = 0.0;
                    for (std::int64_t s = 0; s < op.keys; ++s) {
                        sum +=
                            weights[static_cast<std::size_t>(s)] *
                            at(value, b * op.value_strides.batch + kv * op.value_strides.head + s * op.value_depth + d);
                    }
                    want.push_back(total == 0.0 ? 0.0 : sum / total);
                }
            }
        }
        return want;
    }
};

void check_every_isa(Problem& problem, const std::string& what) {
    const std::vector<double> want = problem.reference();
    for_each_isa([&](const cpu::Kernels& kernels) {
        problem.run(kernels);
        for (std::size_t i = 0; i < want.size(); ++i) {
            const double value = problem.at(problem.out, static_cast<std::int64_t>(i));
            if (std::fabs(value - want[i]) <= tolerance(problem.op.dtype) * std::max(1.0, std::fabs(want[i]))) continue;
            throw std::runtime_error(std::string(kernels.name) + ", " + what + ": element " + std::to_string(i) +
                                     " is " + std::to_string(value) + ", not " + std::to_string(want[i]));
        }
    });
}

}  // namespace

TEST("attention of one row agrees with fp64 on every unit, dtype, group of heads and number of keys") {
    for (const DType dtype : {F32, BF16, F16}) {
        for (const std::int64_t keys : {1, 3, 16, 255, 256, 257, 1000}) {
            Problem alike(dtype, 1, 4, 4, keys, 64, 64, false);
            check_every_isa(alike, std::to_string(keys) + " keys, heads alike");
            Problem grouped(dtype, 2, 6, 2, keys, 24, 17, keys > 1);
            check_every_isa(grouped, std::to_string(keys) + " keys, grouped, odd sizes");
        }
        Problem one(dtype, 1, 8, 1, 70, 576, 512, false);
        check_every_isa(one, "one head of keys");
    }
}

TEST("a key that is not seen adds nothing, whatever its value is, and a row that sees none gives zeros") {
    for_each_isa([&](const cpu::Kernels& kernels) {
        Problem problem(F32, 1, 2, 1, 300, 16, 16, true);
        std::fill(problem.mask.begin(), problem.mask.end(), static_cast<unsigned char>(0));
        for (const std::byte each : problem.run(kernels)) CHECK(each == std::byte{0});
        problem.mask[5] = 1;
        problem.run(kernels);
        for (std::int64_t d = 0; d < 16; ++d) {
            CHECK_EQ(problem.at(problem.out, d), problem.at(problem.value, 5 * 16 + d));
        }
    });
}

TEST("a sequence has the bits that it has alone, with one thread and with several") {
    const int before = threads();
    for_each_isa([&](const cpu::Kernels& kernels) {
        Problem problem(BF16, 3, 8, 4, 900, 64, 64, false);
        const Bytes together = problem.run(kernels);
        for (const int team : {1, 3}) {
            set_threads(team);
            CHECK(problem.run(kernels) == together);
        }
        set_threads(before);
        const Attention all = problem.op;
        problem.op.batch = 1;
        for (std::int64_t b = 0; b < 3; ++b) {
            problem.op.query = problem.query.data() + b * all.query_strides.batch * 2;
            problem.op.key = problem.key.data() + b * all.key_strides.batch * 2;
            problem.op.value = problem.value.data() + b * all.value_strides.batch * 2;
            const Bytes& alone = problem.run(kernels);
            CHECK(std::equal(alone.begin(), alone.begin() + 8 * 64 * 2, together.begin() + b * 8 * 64 * 2));
        }
    });
}

TEST("what is no attention is refused with its sizes") {
    Problem problem(F32, 1, 6, 2, 5, 8, 8, false);
    problem.op.kv_heads = 4;
    CHECK(ERROR_OF(cpu::attend(problem.op)).what() == std::string("batch=1, heads=6, kv_heads=4, keys=5: heads are a "
                                                                  "multiple of kv_heads, and there is a key"));
    problem.op.kv_heads = 2;
    problem.op.depth = 2000;
    CHECK(ERROR_OF(cpu::attend(problem.op)).what() == std::string("a head of 2000 is not one of 1 to 1024"));
    problem.op.depth = 8;
    problem.op.key = nullptr;
    CHECK(ERROR_OF(cpu::attend(problem.op)).what() == std::string("query_ptr, key_ptr, value_ptr or out_ptr is 0"));
}

TEST("RMSNorm agrees with fp64 on every unit and dtype, row by row") {
    for (const DType dtype : {F32, BF16, F16}) {
        for (const std::int64_t width : {1, 7, 16, 33, 64, 1000}) {
            Problem numbers(dtype, 1, 1, 1, 1, 1, 1, false);
            const std::int64_t rows = 37;
            const Bytes x = numbers.numbers(rows * width, 2.0F), weight = numbers.numbers(width, 1.0F);
            Bytes out(x.size());
            const RmsNorm op{rows, width, dtype, 1e-5F, x.data(), weight.data(), out.data()};
            for_each_isa([&](const cpu::Kernels& kernels) {
                cpu::rms_norm(op, kernels);
                for (std::int64_t r = 0; r < rows; ++r) {
                    double mean = 0.0;
                    for (std::int64_t i = 0; i < width; ++i)
                        mean += std::pow(numbers.at(x, r * width + i), 2) / double(width);
                    for (std::int64_t i = 0; i < width; ++i) {
                        const double want =
                            numbers.at(weight, i) * numbers.at(x, r * width + i) / std::sqrt(mean + 1e-5);
                        CHECK(std::fabs(numbers.at(out, r * width + i) - want) <=
                              2 * tolerance(dtype) * std::max(1.0, std::fabs(want)));
                    }
                }
            });
        }
    }
}

EMOE_TEST_MAIN
