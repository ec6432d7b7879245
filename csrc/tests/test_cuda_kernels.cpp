// Conformance of the GPU kernels with the fp64 reference: the CPU suite's table of cases, and cases at the edges of the
// kernels' tiles. On the emulation, or, built with EMOE_CUDA=1, on a GPU (benchmarks/gpu_acceptance.py).
#include <algorithm>
#include <cmath>
#include <iostream>
#include <numeric>

#include "tests/device_problem.hpp"

using namespace emoe;
using emoe::test::BF16;
using emoe::test::DeviceBytes;
using emoe::test::DeviceProblem;
using emoe::test::F16;
using emoe::test::F32;
using emoe::test::MlpCase;
using emoe::test::Problem;
using emoe::test::run_on_device;

namespace {

constexpr Activation kSilu = Activation::kSilu;

// clang-format off
const MlpCase kTileCases[] = {
    // what, weights, hidden, routing, T, K, E, H, I, Ho, activation, gate, interleaved, transposed, bias, gap
    {"tiles: one row past a tile",        BF16, BF16, F32,  65, 1, 1, 32, 64,  128, kSilu},
    {"tiles: past a block of columns",    BF16, BF16, BF16, 17, 1, 1, 64, 72,  136, kSilu, true, false, false, true},
    {"tiles: depth of 8",                 F16,  F16,  F32,  20, 2, 3, 8,  8,   8,   kSilu},
    {"tiles: odd outputs",                F16,  F16,  F16,  20, 2, 3, 40, 24,  37,  kSilu},
    {"tiles: no gate",                    BF16, BF16, F32,  33, 1, 1, 40, 136, 40,  Activation::kRelu2, false, false, false, true},
    {"tiles: no gate, transposed",        F16,  F16,  F32,  33, 1, 1, 40, 136, 136, Activation::kRelu, false, false, true, true},
    {"tiles: interleaved rows",           BF16, BF16, F32,  20, 2, 3, 40, 72,  40,  kSilu, true, true, false, true},
    {"tiles: transposed",                 BF16, BF16, F32,  20, 2, 3, 72, 72,  136, kSilu, true, false, true, true},
    {"tiles: transposed, interleaved",    F16,  F16,  F32,  70, 1, 1, 40, 72,  136, Activation::kSwigluClamped, true, true, true, true},
    {"tiles: fp32 hidden",                BF16, F32,  F32,  20, 2, 3, 40, 24,  40,  kSilu},
    {"tiles: bf16 hidden, fp16 weights",  F16,  BF16, F32,  20, 2, 3, 40, 24,  40,  kSilu},
    {"tiles: many experts, few rows each", BF16, BF16, BF16, 12, 8, 40, 16, 8,  16,  kSilu},
    {"rows: past a tile of rows",         BF16, BF16, F32,  8,  1, 1, 64, 40,  72,  kSilu, true, false, false, true},
    {"rows: deeper than a warp's stride", BF16, BF16, F32,  2,  1, 2, 520, 24, 24,  kSilu},
    {"rows: fp32, deeper",                F32,  BF16, F32,  2,  1, 2, 260, 20, 20,  kSilu},
    {"rows: transposed",                  BF16, F16,  F32,  5,  2, 3, 72, 40,  72,  kSilu, true, false, true, true},
    {"rows: transposed, fp32",            F32,  F32,  F32,  5,  2, 3, 72, 40,  72,  kSilu, true, false, true, true},
    {"rows: no gate",                     F16,  F16,  F32,  5,  2, 3, 72, 72,  72,  Activation::kGelu, false, false, false, true},
};
// clang-format on

bool rounds_to_weights(const Problem& p, const cuda::Mlp& op) {
    return p.layout.dtype != F32 && cuda::path_of(op) == cuda::Path::kTiles;
}

// Relative to the largest value: fp32 rounding, except where tensor cores take rounded activations.
double tolerance(const Problem& p, const cuda::Mlp& op) {
    if (!rounds_to_weights(p, op)) return 4e-6;
    const bool coarse = p.layout.dtype == BF16 || p.c.hidden != p.layout.dtype;
    return coarse ? 8e-3 : 1e-3;
}

void check_close(const std::vector<float>& got, const std::vector<double>& want, double relative,
                 const std::string& what) {
    CHECK_EQ(got.size(), want.size());
    double largest = 1e-30;
    for (const double value : want) largest = std::max(largest, std::fabs(value));
    for (std::size_t i = 0; i < got.size(); ++i) {
        const double off = std::fabs(static_cast<double>(got[i]) - want[i]);
        if (off <= relative * largest) continue;  // false for a NaN
        test::fail(__FILE__, __LINE__,
                   what + ": element " + std::to_string(i) + " is " + std::to_string(got[i]) + ", not " +
                       std::to_string(want[i]) + " (largest " + std::to_string(largest) + ")");
    }
}

void check_case(const MlpCase& c, unsigned seed) {
    Problem p(c, seed);
    const std::string reason = cuda::refusal(p.layout);
    if (!reason.empty()) {
        CHECK(c.gap % itemsize(c.weights) != 0);  // the only layouts there are no kernels for
        if (seed == 1) std::cout << "not supported on a GPU: " << c.what << " (" << reason << ")\n";
        return;
    }
    DeviceProblem d(p);
    check_close(d.run(p.slot_of), test::reference(p), tolerance(p, d.op), c.what);
}

MlpCase case_of(DType dtype, std::int64_t T, bool transposed = false) {
    MlpCase c{"case", dtype, dtype, F32, T, 3, 5, 40, 24, 40, kSilu};
    c.transposed = transposed;
    c.bias = true;
    return c;
}

bool same_bits(const std::vector<float>& a, const std::vector<float>& b) {
    return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
}

}  // namespace

TEST("every case of the CPU's table agrees with the fp64 reference, or is refused") {
    for (const MlpCase& c : test::kCases) check_case(c, 1);
}

TEST("every case at an edge of the kernels' tiles agrees with the fp64 reference, with several seeds") {
    for (const MlpCase& c : kTileCases) {
        for (const unsigned seed : {1U, 2U}) check_case(c, seed);
    }
}

TEST("every activation agrees with the fp64 reference on both paths") {
    for (int a = 0; a <= static_cast<int>(Activation::kSiluClamped); ++a) {
        for (const std::int64_t T : {2, 10}) {
            MlpCase c = case_of(F16, T);
            c.activation = static_cast<Activation>(a);
            check_case(c, 3);
        }
    }
}

TEST("pairs are bit-identical however experts are spread over calls") {
    for (const DType dtype : {F32, BF16}) {
        for (const std::int64_t T : {3, 12}) {
            Problem p(case_of(dtype, T));
            p.index[1] = p.index[0];  // a token that names an expert twice
            const std::vector<float> want = run_on_device(p);
            check_close(want, test::reference(p), dtype == F32 ? 4e-6 : 8e-3, "an expert named twice");
            std::vector<std::vector<std::int32_t>> tables;
            for (std::int64_t e = p.c.E - 1; e >= 0; --e) {
                tables.emplace_back(p.slot_of.size(), -1);
                tables.back()[e] = p.slot_of[e];
            }
            CHECK(same_bits(DeviceProblem(p).run(tables), want));
        }
    }
}

TEST("a row's bits do not depend on the other rows, up to 8 tokens and again from 9") {
    for (const bool transposed : {false, true}) {
        for (const auto& [most, fewer] : {std::pair{8, std::vector{1, 3, 7}}, std::pair{70, std::vector{9, 20}}}) {
            const auto with_tokens = [&](std::int64_t T) {
                Problem p(case_of(BF16, most, transposed));
                p.c.T = T;
                return p;
            };
            const std::vector<float> all = run_on_device(with_tokens(most));
            for (const std::int64_t T : fewer) {
                const std::vector<float> some = run_on_device(with_tokens(T));
                CHECK(std::memcmp(some.data(), all.data(), some.size() * sizeof(float)) == 0);
            }
        }
    }
}

TEST("ids outside the experts and experts without a slot leave their pairs at zero") {
    for (const std::int64_t T : {4, 12}) {
        Problem p(case_of(BF16, T));
        p.index[0] = -1;
        p.index[4] = p.c.E;
        p.index[5] = std::int64_t{1} << 40;
        p.slot_of[2] = -1;
        check_close(run_on_device(p), test::reference(p), 8e-3, "skipped pairs");
        p.slot_of.assign(p.slot_of.size(), -1);
        for (const float value : run_on_device(p)) CHECK_EQ(value, 0.0F);
    }
}

TEST("more experts than threads of a block, and than a part of a slot table, are routed") {
    MlpCase c{"experts", F32, F32, F32, 20, 7, 1000, 4, 4, 4, kSilu};
    check_case(c, 1);
}

TEST("no token is no work") {
    Problem p(case_of(F32, 1));
    DeviceProblem d(p);
    d.op.tokens = 0;
    CHECK(d.run(p.slot_of).empty());
}

TEST("hidden states that are not 16-byte aligned are read right on both paths") {
    for (const DType dtype : {BF16, F32}) {
        for (const std::int64_t T : {2, 12}) {
            const Problem p(case_of(dtype, T));
            DeviceProblem d(p);
            const auto shift = static_cast<std::size_t>(itemsize(dtype));
            std::vector<std::byte> moved(p.hidden.size() + shift);
            std::memcpy(moved.data() + shift, p.hidden.data(), p.hidden.size());
            const DeviceBytes elsewhere(moved, d.stream.get());
            d.op.hidden = elsewhere.as() + shift;
            check_close(d.run(p.slot_of), test::reference(p), tolerance(p, d.op), "unaligned hidden states");
        }
    }
}

// Picks by the rule of kernels.hpp: the first K candidates that have a slot.
Problem restricted(const Problem& p, std::int64_t K, bool keep_mass, std::vector<float>& substituted) {
    Problem made = p;
    made.c.K = K;
    made.index.clear();
    made.weights.clear();
    made.c.routing = F32;
    substituted.clear();
    for (std::int64_t t = 0; t < p.c.T; ++t) {
        std::vector<std::int64_t> picks;
        std::vector<float> values;
        float asked = 0, missing = 0, given = 0;
        for (std::int64_t k = 0; k < p.c.K; ++k) {
            const std::int64_t id = p.index[t * p.c.K + k];
            const float weight =
                test::value_at(p.weights.data() + (t * p.c.K + k) * itemsize(p.c.routing), p.c.routing);
            const bool resident = p.slot_of[id] >= 0;
            if (k < K) asked += weight;
            if (k < K && !resident) missing += weight;
            if (!resident || static_cast<std::int64_t>(picks.size()) == K) continue;
            picks.push_back(id);
            values.push_back(weight);
            given += weight;
        }
        for (float& value : values) value *= keep_mass ? asked / given : 1.0F;
        substituted.push_back(missing / asked);
        picks.resize(K, p.c.E);
        values.resize(K);
        made.index.insert(made.index.end(), picks.begin(), picks.end());
        const auto* bytes = reinterpret_cast<const std::byte*>(values.data());
        made.weights.insert(made.weights.end(), bytes, bytes + K * 4);
    }
    return made;
}

TEST("in resident mode the picks are the first candidates that have a slot, and their mass is reported") {
    for (const bool keep_mass : {false, true}) {
        for (const std::int64_t C : {6, 40}) {
            MlpCase c{"resident", BF16, BF16, BF16, 11, C, 48, 16, 8, 16, kSilu};
            Problem p(c);
            for (std::int64_t t = 0; t < c.T; ++t) {  // candidates are different experts, as a router's are
                std::iota(p.index.begin() + t * C, p.index.begin() + (t + 1) * C, t % 8);
            }
            for (std::int64_t e = 0; e < c.E; ++e) {
                if (e % 5 == 1 || e % 3 == 0) p.slot_of[e] = -1;
            }
            std::vector<float> substituted;
            const Problem want = restricted(p, 4, keep_mass, substituted);
            DeviceProblem d(p);
            DeviceBytes share(substituted.size() * 4, d.stream.get());
            d.op.candidates = C;
            d.op.top_k = 4;
            d.op.keep_mass = keep_mass;
            d.op.substituted = share.as<float>();
            check_close(d.run(p.slot_of), test::reference(want), 8e-3, "resident mode");
            std::vector<float> got(substituted.size());
            share.download(got.data());
            for (std::size_t t = 0; t < got.size(); ++t) CHECK(std::fabs(got[t] - substituted[t]) < 1e-5F);
        }
    }
}

TEST("combine sums in ascending order and rounds once, in every dtype; adding needs fp32") {
    constexpr std::int64_t T = 3, K = 4, H = 37;
    const cuda::Stream& stream = test::test_stream();
    std::mt19937 random(3);
    std::vector<float> pairs(T * K * H);
    for (float& value : pairs) {
        value = std::ldexp(static_cast<float>(random()) / 4294967296.0F - 0.5F, static_cast<int>(random() % 45) - 26);
    }
    const DeviceBytes device_pairs(pairs, stream.get());
    for (const DType dtype : {F32, BF16, F16}) {
        for (const bool add : {false, true}) {
            if (add && dtype != F32) continue;
            const auto size = static_cast<std::size_t>(itemsize(dtype));
            std::vector<std::byte> out(T * H * size + 4, std::byte{0x40});
            DeviceBytes device_out(out, stream.get());
            cuda::combine(device_pairs.as<float>(), T, K, H, device_out.as(), dtype, add, stream.get());
            const float before = test::value_at(out.data(), F32);
            device_out.download(out.data());
            for (std::int64_t i = 0; i < T * H; ++i) {
                float sum = 0.0F;
                for (std::int64_t k = 0; k < K; ++k) sum += pairs[(i / H * K + k) * H + i % H];
                std::byte want[4];
                test::put(want, dtype, add ? before + sum : sum);
                CHECK(std::memcmp(out.data() + i * static_cast<std::int64_t>(size), want, size) == 0);
            }
            CHECK(std::all_of(out.end() - 4, out.end(), [](std::byte value) { return value == std::byte{0x40}; }));
        }
    }
    CHECK_ERROR(ErrorKind::kConfig, cuda::combine(nullptr, T, K, H, nullptr, F32, false, stream.get()));
    CHECK_ERROR(ErrorKind::kConfig, cuda::combine(nullptr, 0, K, H, nullptr, BF16, true, stream.get()));
    CHECK_ERROR(ErrorKind::kConfig, cuda::combine(nullptr, 0, K, H, nullptr, DType::kInt8, false, stream.get()));
}

TEST("NaN and infinity pass through on both paths") {
    for (const std::int64_t T : {2, 12}) {
        for (const float value : {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity()}) {
            for (const Activation activation : {kSilu, Activation::kRelu, Activation::kSiluClamped}) {
                MlpCase c = case_of(BF16, T);
                c.activation = activation;
                Problem p(c);
                test::put(p.hidden.data() + p.c.H * itemsize(p.c.hidden), p.c.hidden, value);
                const std::vector<float> got = run_on_device(p);
                const std::vector<double> want = test::reference(p);
                for (std::size_t i = 0; i < got.size(); ++i) {
                    if (std::isnan(value)) CHECK_EQ(std::isnan(got[i]), i / (p.c.K * p.c.Ho) == 1);
                    if (i / (p.c.K * p.c.Ho) != 1) CHECK(std::fabs(got[i] - want[i]) < 0.1);
                }
            }
        }
    }
}

TEST("layouts and calls that contradict themselves are refused with the value in the way") {
    const Problem p(case_of(BF16, 2));
    const auto refused = [&](auto&& change, const std::string& word) {
        DeviceProblem d(p);
        float out = 0;
        d.op.out = &out;
        change(d.op);
        std::byte workspace[1];
        const Error error = ERROR_OF(cuda::route(d.op, workspace, d.stream.get()));
        CHECK_EQ(static_cast<int>(error.kind), static_cast<int>(ErrorKind::kConfig));
        CHECK(error.message.find(word) != std::string::npos);
        CHECK_ERROR(ErrorKind::kConfig, cuda::gather_mlp(d.op, workspace, d.stream.get()));
    };
    refused([](cuda::Mlp& op) { op.layout.gate_up_offset = 1; }, "gate_up_offset=1");
    refused([](cuda::Mlp& op) { op.layout.dtype = DType::kInt8; }, "int8");
    refused([](cuda::Mlp& op) { op.layout.hidden_out = std::int64_t{1} << 25; }, "hidden_out=33554432");
    refused([](cuda::Mlp& op) { op.hidden_dtype = DType::kFloat64; }, "float64");
    refused([](cuda::Mlp& op) { op.weights_dtype = DType::kInt64; }, "int64");
    refused([](cuda::Mlp& op) { op.slot_bytes -= 2; }, "slot_bytes=");
    refused([](cuda::Mlp& op) { op.slot_bytes += 1; }, "slot_bytes=");
    refused([](cuda::Mlp& op) { op.experts = 9000; }, "experts=9000");
    refused([](cuda::Mlp& op) { op.top_k = 0; }, "top_k=0");
    refused([](cuda::Mlp& op) { op.candidates = 2; }, "candidates=2");
    refused([](cuda::Mlp& op) { op.tokens = -1; }, "tokens=-1");
    refused([](cuda::Mlp& op) { op.tokens = std::int64_t{1} << 40; }, "tokens=");
    refused([](cuda::Mlp& op) { op.out = nullptr; }, "out");
    refused([](cuda::Mlp& op) { op.slab += 8; }, "slab");
    CHECK(cuda::supports(p.layout));
    MlpLayout other = p.layout;
    other.dtype = DType::kInt8;
    CHECK(!cuda::supports(other));
    CHECK(!cuda::tiles_possible(Problem(case_of(F32, 20)).layout, 1 << 20));
    CHECK(cuda::tiles_possible(p.layout, p.slot_bytes) == (p.slot_bytes % 16 == 0));
}

EMOE_TEST_MAIN
