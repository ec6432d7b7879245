// A decode step of an attention block gives, bit for bit, what its parts give one after the other.
#include <algorithm>
#include <array>
#include <random>
#include <span>
#include <string>
#include <vector>

#include "core/parallel.hpp"
#include "cpu/attention.hpp"
#include "cpu/attention_block.hpp"
#include "cpu/gather_mlp.hpp"
#include "cpu/kernels.hpp"
#include "cpu/linear.hpp"
#include "tests/check.hpp"
#include "tests/encoded_cases.hpp"
#include "tests/kernel_cases.hpp"

using namespace emoe;
using emoe::test::BF16;
using emoe::test::CodesCase;
using emoe::test::EncodedProblem;
using emoe::test::F16;
using emoe::test::F32;
using emoe::test::kCodesCases;

namespace {

using Bytes = std::vector<std::byte>;

constexpr std::int64_t kHeads = 4, kKvHeads = 2, kDepth = 64, kInputs = 512, kKeys = 37, kRoom = kKeys + 3;
const std::size_t kCases = std::size(kCodesCases);

enum class Norms { kNone, kHead, kAll };

template <typename Fn>
void for_each_isa(Fn&& fn) {
    for (const std::string& isa : cpu::available_isas()) fn(cpu::kernels_named(isa));
}

struct Problem {
    std::mt19937 random{3};
    DType dtype;
    std::vector<EncodedProblem> matrices;
    AttentionBlock block;
    AttentionStep step;
    Bytes x, cos, sin, key, value, y, query_norm, key_norm, bias;
    std::vector<unsigned char> mask;

    Problem(DType of, std::int64_t batch, const std::array<CodesCase, 4>& codes, Norms norms, std::int64_t rotated,
            bool masked = false)
        : dtype(of) {
        matrices.reserve(4);
        block.dtype = dtype;
        block.heads = kHeads;
        block.kv_heads = kKvHeads;
        block.depth = kDepth;
        bias = numbers(kHeads * kDepth);
        block.query = projection(codes[0], kHeads * kDepth, kInputs);
        block.query.bias = bias.data();
        block.query.bias_dtype = dtype;
        block.key = projection(codes[1], kKvHeads * kDepth, kInputs);
        block.value = projection(codes[2], kKvHeads * kDepth, kInputs);
        block.out = projection(codes[3], kInputs, kHeads * kDepth);
        if (norms != Norms::kNone) {
            const bool all = norms == Norms::kAll;
            query_norm = numbers(all ? kHeads * kDepth : kDepth);
            key_norm = numbers(all ? kKvHeads * kDepth : kDepth);
            block.query_norm = {query_norm.data(), all ? kHeads * kDepth : kDepth, 1e-5F};
            block.key_norm = {key_norm.data(), all ? kKvHeads * kDepth : kDepth, 1e-3F};
        }
        step.batch = batch;
        x = numbers(batch * kInputs);
        cos = numbers(batch * std::max<std::int64_t>(rotated, 1));
        sin = numbers(batch * std::max<std::int64_t>(rotated, 1));
        key = numbers(batch * kKvHeads * kRoom * kDepth);
        value = numbers(batch * kKvHeads * kRoom * kDepth);
        y.resize(x.size());
        step.x = x.data();
        step.cos = cos.data();
        step.sin = sin.data();
        step.rotated = rotated;
        step.position_stride = rotated;
        step.keys = kKeys;
        step.key = key.data();
        step.value = value.data();
        step.key_strides = step.value_strides = {kKvHeads * kRoom * kDepth, kRoom * kDepth, kDepth};
        step.scale = 0.2F;
        step.y = y.data();
        if (masked) {
            for (std::int64_t i = 0; i < batch * kKeys; ++i) mask.push_back(random() % 3 != 0 ? 1 : 0);
            step.mask = mask.data();
            step.mask_strides = {kKeys, 0, 1};
        }
    }
    Bytes numbers(std::int64_t count) {
        std::normal_distribution<float> normal;
        Bytes made(static_cast<std::size_t>(count * itemsize(dtype)));
        for (std::int64_t i = 0; i < count; ++i) test::put(made.data() + i * itemsize(dtype), dtype, normal(random));
        return made;
    }
    Projection projection(const CodesCase& codes, std::int64_t rows, std::int64_t depth) {
        matrices.emplace_back(test::EncodedCase{codes, codes, kCodesCases[0], dtype, 1, 1, 1, depth, rows, 8}, 5);
        return {matrices.back().layout.gate, matrices.back().slab.data(), nullptr, F32};
    }

    // y, then keys and values as the step leaves them.
    std::array<Bytes, 3> run(const cpu::Kernels& kernels) {
        const Bytes before[2] = {key, value};
        std::fill(y.begin(), y.end(), std::byte{0xFF});
        cpu::attention_step(block, step, kernels);
        std::array<Bytes, 3> result = {y, key, value};
        std::copy(before[0].begin(), before[0].end(), key.begin());
        std::copy(before[1].begin(), before[1].end(), value.begin());
        return result;
    }

    Bytes multiplied(const Projection& by, const Bytes& rows, const cpu::Kernels& kernels) const {
        Bytes out(static_cast<std::size_t>(step.batch * by.weights.count * itemsize(dtype)));
        cpu::linear({by.weights, by.base, rows.data(), step.batch, dtype, by.bias, by.bias_dtype, out.data()}, kernels);
        return out;
    }
    Bytes normed(const BlockNorm& norm, const Bytes& rows, const cpu::Kernels& kernels) const {
        if (norm.weight == nullptr) return rows;
        Bytes out(rows.size());
        const auto count = static_cast<std::int64_t>(rows.size()) / itemsize(dtype) / norm.width;
        cpu::rms_norm({count, norm.width, dtype, norm.epsilon, rows.data(), norm.weight, out.data()}, kernels);
        return out;
    }
    // Rounded where torch's operations round.
    Bytes turned(const Bytes& rows, std::int64_t heads) const {
        const std::int64_t size = itemsize(dtype), half = step.rotated / 2;
        Bytes out = rows;
        const auto rounded = [&](float number) {
            std::byte kept[4];
            test::put(kept, dtype, number);
            return test::value_at(kept, dtype);
        };
        for (std::int64_t head = 0; head < step.batch * heads; ++head) {
            const std::int64_t at = head / heads * step.position_stride;
            for (std::int64_t i = 0; i < step.rotated; ++i) {
                const auto element = [&](std::int64_t k) {
                    return test::value_at(rows.data() + (head * kDepth + k) * size, dtype);
                };
                const float other = i < half ? -element(i + half) : element(i - half);
                const volatile float first = rounded(element(i) * test::value_at(cos.data() + (at + i) * size, dtype));
                const volatile float second = rounded(other * test::value_at(sin.data() + (at + i) * size, dtype));
                test::put(out.data() + (head * kDepth + i) * size, dtype, first + second);
            }
        }
        return out;
    }
    std::array<Bytes, 3> one_after_the_other(const cpu::Kernels& kernels) const {
        const std::int64_t size = itemsize(dtype);
        const Bytes query = turned(normed(block.query_norm, multiplied(block.query, x, kernels), kernels), kHeads);
        const Bytes new_key = turned(normed(block.key_norm, multiplied(block.key, x, kernels), kernels), kKvHeads);
        const Bytes new_value = multiplied(block.value, x, kernels);
        Bytes keys = key, values = value, attended(query.size());
        for (std::int64_t head = 0; head < step.batch * kKvHeads; ++head) {
            const std::int64_t to = (head * kRoom + kKeys - 1) * kDepth * size, from = head * kDepth * size;
            std::copy_n(new_key.begin() + from, kDepth * size, keys.begin() + to);
            std::copy_n(new_value.begin() + from, kDepth * size, values.begin() + to);
        }
        Attention attention;
        attention.batch = step.batch;
        attention.heads = kHeads;
        attention.kv_heads = kKvHeads;
        attention.keys = kKeys;
        attention.depth = attention.value_depth = kDepth;
        attention.dtype = dtype;
        attention.scale = step.scale;
        attention.query = query.data();
        attention.query_strides = {kHeads * kDepth, kDepth, 0};
        attention.key = keys.data();
        attention.value = values.data();
        attention.key_strides = attention.value_strides = step.key_strides;
        attention.mask = step.mask;
        attention.mask_strides = step.mask_strides;
        attention.out = attended.data();
        cpu::attend(attention, kernels);
        return {multiplied(block.out, attended, kernels), keys, values};
    }
};

void check_every_isa(Problem& problem, const std::string& what) {
    for_each_isa([&](const cpu::Kernels& kernels) {
        if (problem.run(kernels) == problem.one_after_the_other(kernels)) return;
        throw std::runtime_error(std::string(kernels.name) + ", " + what + ": not what the parts give");
    });
}

std::array<CodesCase, 4> all(const CodesCase& codes) { return {codes, codes, codes, codes}; }

}  // namespace

TEST("a step gives what its parts give, whatever the three projections of a row are encoded in") {
    for (std::size_t i = 0; i < kCases; ++i) {
        const std::array<CodesCase, 4> mixed = {kCodesCases[i], kCodesCases[(i + 2) % kCases],
                                                kCodesCases[(i + 15) % kCases], kCodesCases[0]};
        for (const DType dtype : {F32, BF16}) {
            Problem problem(dtype, 1, mixed, Norms::kNone, kDepth);
            check_every_isa(problem, described(mixed[0]) + ", " + described(mixed[1]) + ", " + described(mixed[2]));
        }
    }
}

TEST("norms of a head or of all, a head that turns in part or not at all, masks, and every dtype") {
    for (const DType dtype : {F32, BF16, F16}) {
        for (const Norms norms : {Norms::kNone, Norms::kHead, Norms::kAll}) {
            for (const std::int64_t rotated : {kDepth, kDepth / 2, std::int64_t{0}}) {
                Problem problem(dtype, 2, all(kCodesCases[2]), norms, rotated, true);
                check_every_isa(problem, "rotated " + std::to_string(rotated));
            }
        }
    }
}

TEST("a sequence of a step has the bits that it has alone, with one thread and with several") {
    const int before = threads();
    for (const std::size_t codes : {2, 4, 10}) {
        Problem problem(BF16, 8, all(kCodesCases[codes]), Norms::kHead, kDepth);
        for_each_isa([&](const cpu::Kernels& kernels) {
            const std::array<Bytes, 3> together = problem.run(kernels);
            for (const int team : {1, 3}) {
                set_threads(team);
                CHECK(problem.run(kernels) == together);
            }
            set_threads(before);
            const AttentionStep whole = problem.step;
            problem.step.batch = 1;
            for (std::int64_t b = 0; b < whole.batch; ++b) {
                problem.step.x = problem.x.data() + b * kInputs * 2;
                problem.step.cos = problem.cos.data() + b * kDepth * 2;
                problem.step.sin = problem.sin.data() + b * kDepth * 2;
                problem.step.key = problem.key.data() + b * kKvHeads * kRoom * kDepth * 2;
                problem.step.value = problem.value.data() + b * kKvHeads * kRoom * kDepth * 2;
                const Bytes alone = problem.run(kernels)[0];
                CHECK(std::equal(alone.begin(), alone.begin() + kInputs * 2, together[0].begin() + b * kInputs * 2));
            }
            problem.step = whole;
        });
    }
}

TEST("sequences share a row of positions where they are as far") {
    Problem problem(F32, 3, all(kCodesCases[0]), Norms::kNone, kDepth);
    problem.step.position_stride = 0;
    check_every_isa(problem, "one row of positions");
}

TEST("layers of one x are one loop of at most three, and of few rows") {
    Problem problem(F32, 8, all(kCodesCases[0]), Norms::kNone, kDepth);
    const cpu::Kernels& kernels = cpu::active_kernels();
    const Projection& by = problem.block.query;
    const Linear op{by.weights, by.base, problem.x.data(), 8, F32, nullptr, F32, problem.y.data()};
    const std::string why = "linear layers of one call are at most 3 of the same x, of at most 8 rows";
    const std::array<Linear, 4> four = {op, op, op, op};
    CHECK(ERROR_OF(cpu::narrow_linear(four, kernels)).what() == why);
    std::array<Linear, 2> two = {op, op};
    two[1].x = problem.y.data();
    CHECK(ERROR_OF(cpu::narrow_linear(two, kernels)).what() == why);
    two[0].tokens = two[1].tokens = 9;
    CHECK(ERROR_OF(cpu::narrow_linear(std::span(two).first(1), kernels)).what() == why);
    cpu::narrow_linear(std::span<const Linear>(), kernels);
}

TEST("sizes that contradict each other and addresses that are missing are refused") {
    Problem problem(F32, 2, all(kCodesCases[0]), Norms::kHead, kDepth);
    const auto refused = [&](auto&& change, const std::string& why) {
        const AttentionBlock block = problem.block;
        const AttentionStep step = problem.step;
        change();
        CHECK_EQ(std::string(ERROR_OF(cpu::attention_step(problem.block, problem.step)).what()), why);
        problem.block = block;
        problem.step = step;
    };
    refused([&] { problem.block.kv_heads = 3; }, "heads=4, kv_heads=3: heads are a multiple of kv_heads");
    refused([&] { problem.block.depth = 2000; }, "a head of 2000 is not one of 1 to 1024");
    refused([&] { problem.block.depth = 32; }, "query: count=256, but heads * depth is 128");
    refused([&] { problem.block.value = problem.block.query; }, "value: count=256, but kv_heads * depth is 128");
    refused([&] { problem.block.out = problem.block.query; }, "out: depth=512, but heads * depth is 256");
    refused([&] { problem.block.key.base = nullptr; }, "key: its address is 0");
    refused([&] { problem.block.query_norm.width = 7; },
            "query_norm: width=7 is not that of a head, 64, nor of all, 256");
    refused([&] { problem.block.dtype = parse_dtype("int32"); },
            "the block of int32 is not one of: float32, float16, bfloat16");
    refused([&] { problem.step.rotated = 65; }, "rotated=65: an even number of a head's 64");
    refused([&] { problem.step.rotated = 66; }, "rotated=66: an even number of a head's 64");
    refused([&] { problem.step.cos = nullptr; }, "cos_ptr or sin_ptr is 0");
    refused([&] { problem.step.y = nullptr; }, "x_ptr, key_ptr, value_ptr or y_ptr is 0");
    refused([&] { problem.step.keys = 0; }, "batch=2, keys=0: there is a key");
    refused([&] { problem.step.batch = 9; }, "batch=9 is more than the 8 sequences of one step");
}

EMOE_TEST_MAIN
