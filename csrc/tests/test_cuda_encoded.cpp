// Conformance of the GPU kernels for encoded experts with the fp64 reference on what the CPU says the bytes are, and of
// each number that they decode with the CPU's. As test_cuda_kernels.cpp, on the emulation or on a GPU.
#include <algorithm>
#include <cmath>
#include <iostream>

#include "tests/device_problem.hpp"
#include "tests/encoded_cases.hpp"
#ifdef EMOE_EMULATE
#include "cuda/decode_any.cuh"
#include "cuda/launch.hpp"
#endif

using namespace emoe;
using emoe::test::BF16;
using emoe::test::CodesCase;
using emoe::test::DeviceBytes;
using emoe::test::DeviceProblem;
using emoe::test::EncodedCase;
using emoe::test::EncodedProblem;
using emoe::test::F16;
using emoe::test::F32;
using emoe::test::kCodesCases;
using emoe::test::run_on_device;

namespace {

constexpr std::int64_t kAlignment = 16;  // of arrays in a slot; Python gives 64

// ThreadSanitizer finds nothing in arithmetic, and is slow: a few codes stand for all.
#if defined(__SANITIZE_THREAD__)
constexpr std::size_t kEvery = 9;
#else
constexpr std::size_t kEvery = 1;
#endif

EncodedCase all(const CodesCase& codes, DType hidden, std::int64_t T, std::int64_t H = 256, std::int64_t I = 256,
                std::int64_t Ho = 40) {
    return {codes, codes, codes, hidden, T, 2, 2, H, I, Ho};
}

// Cases whose groups a GPU decodes; the others are those that a test below finds refused.
std::vector<CodesCase> cases() {
    std::vector<CodesCase> chosen;
    for (std::size_t i = 0; i < std::size(kCodesCases); i += kEvery) {
        if (kCodesCases[i].scale_cols % 8 == 0 && !has_grid(kCodesCases[i].codes)) chosen.push_back(kCodesCases[i]);
    }
    return chosen;
}

// Relative to the largest value: fp32 rounding, except where tensor cores take rounded numbers.
double tolerance(const cuda::Mlp& op) {
    if (cuda::path_of(op) == cuda::Path::kRows) return 4e-6;
    return op.hidden_dtype == BF16 ? 1e-2 : 1.5e-3;
}

void check_close(const EncodedCase& c, const std::string& what) {
    EncodedProblem p(c, 1, kAlignment);
    // Random blocks of 256 and e5m2 are large: h is to stay in fp16.
    const bool large = codes_row(c.gate.codes).values == 256 || c.gate.codes == Codes::kE5M2;
    for (std::int64_t i = 0; i < c.T * c.H && c.hidden == F16 && large; ++i) {
        test::put(p.hidden.data() + 2 * i, F16, test::value_at(p.hidden.data() + 2 * i, F16) / 256.0F);
    }
    DeviceProblem d(p);
    CHECK_EQ(cuda::refusal(p.layout), "");
    const std::vector<float> got = d.run(p.slot_of);
    const std::vector<double> want = test::reference(p);
    double largest = 1e-30;
    for (const double value : want) largest = std::max(largest, std::fabs(value));
    for (std::size_t i = 0; i < got.size(); ++i) {
        const double error = std::fabs(got[i] - want[i]) / largest;
        if (error <= tolerance(d.op)) continue;  // false for a NaN
        test::fail(__FILE__, __LINE__,
                   what + ", " + std::to_string(c.T) + " tokens of " + std::string(dtype_name(c.hidden)) +
                       ": element " + std::to_string(i) + " is " + std::to_string(got[i]) + ", not " +
                       std::to_string(want[i]) + " (error " + std::to_string(error) + ")");
    }
}

bool same_bits(const std::vector<float>& a, const std::vector<float>& b) {
    return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
}

// The least depth that every encoding of the case has whole blocks of.
std::int64_t depth_for(const CodesCase& c) {
    return std::max<std::int64_t>({codes_row(c.codes).values, c.scale_cols, 32});
}

}  // namespace

#ifdef EMOE_EMULATE
TEST("every number that is decoded is the CPU's, to the last bits") {
    for (const CodesCase& codes : cases()) {
        EncodedCase c = all(codes, F32, 1);
        c.interleaved = true;
        const EncodedProblem p(c, 2, kAlignment);
        const auto* slot = reinterpret_cast<const unsigned char*>(p.slab.data());
        std::vector<float> want(static_cast<std::size_t>(c.H));
        for (const Weights& w : {p.layout.gate, p.layout.up, p.layout.down}) {
            const cuda::Matrix m = cuda::matrix_for(w);
            for (std::int64_t row = 0; row < w.count; ++row) {
                cpu::expand(w, slot, row, 0, w.depth, want.data());
                float largest = 0.0F;
                for (const float value : want) largest = std::max(largest, std::fabs(value));
                for (int k = 0; k < w.depth; k += 8) {
                    float got[8];
                    cuda::AnyCodes::decode(m, slot, static_cast<int>(w.first + row * w.step), k, got);
                    for (int i = 0; i < 8; ++i) CHECK(std::fabs(got[i] - want[k + i]) <= 2e-7F * largest);
                }
            }
        }
    }
}

TEST("every byte of the floats of one byte, and every power of two, is the CPU's") {
    for (const Codes codes : {Codes::kE4M3, Codes::kE5M2, Codes::kInt8, Codes::kMxfp4Blocks}) {
        for (int scale = 0; scale < 256; ++scale) {
            Weights w;
            w.codes = codes;
            w.rows = w.count = 1;
            w.depth = 256;
            w.data = 0;
            alignas(16) unsigned char slot[512];
            for (int i = 0; i < 256; ++i) slot[i] = static_cast<unsigned char>(i);
            if (codes == Codes::kMxfp4Blocks) {
                for (int block = 0; block < 8; ++block) slot[17 * block] = static_cast<unsigned char>(scale);
            } else {
                w.scale = ScaleType::kE8M0;
                w.scales = 256;
                slot[256] = static_cast<unsigned char>(scale);
            }
            float want[256];
            cpu::expand(w, slot, 0, 0, 256, want);
            for (int k = 0; k < 256; k += 8) {
                float got[8];
                cuda::AnyCodes::decode(cuda::matrix_for(w), slot, 0, k, got);
                for (int i = 0; i < 8; ++i) {
                    CHECK(got[i] == want[k + i] || (std::isnan(got[i]) && std::isnan(want[k + i])));
                }
            }
        }
    }
}
#endif

TEST("all codes agree with the fp64 reference on both paths, for hidden states of each type") {
    for (const CodesCase& codes : cases()) {
        for (const auto& [hidden, T] : {std::pair{F32, 1}, {BF16, 6}, {F32, 9}, {BF16, 12}, {F16, 12}}) {
            check_close(all(codes, hidden, T, depth_for(codes), depth_for(codes)), described(codes));
        }
    }
}

TEST("interleaved rows, biases and experts without a gate agree with the fp64 reference") {
    for (const CodesCase& codes : cases()) {
        for (const auto& [hidden, T] : {std::pair{BF16, 3}, {F16, 10}}) {
            EncodedCase c = all(codes, hidden, T, depth_for(codes), depth_for(codes), 24);
            c.bias = c.interleaved = true;
            check_close(c, described(codes) + ", interleaved");
            c.has_gate = c.interleaved = false;
            check_close(c, described(codes) + ", no gate");
        }
    }
}

TEST("sizes that end within a block of the kernels agree with the fp64 reference") {
    const CodesCase bytes{Codes::kE4M3, ScaleType::kBFloat16, 1, 0};
    const CodesCase words{Codes::kInt4, ScaleType::kFloat32, 1, 0};
    const CodesCase columns{Codes::kGptq, ScaleType::kFloat16, 1, 0};
    const CodesCase blocks{Codes::kQ8_0};
    for (const std::int64_t T : {5, 8, 9, 67}) {
        const DType hidden = T == 9 ? F16 : BF16;
        EncodedCase c = all(bytes, hidden, T, 40, 72, 37);
        c.K = c.E = 1;
        check_close(c, "e4m3, odd sizes");
        c.gate = c.up = c.down = words;
        check_close(c, "int4, odd sizes");
        c.gate = c.up = c.down = columns;
        c.Ho = 136;
        check_close(c, "gptq, past a block of rows");
        c.gate = c.up = c.down = blocks;
        c.H = 288;
        c.I = 160;
        check_close(c, "q8_0, past a block of rows and a warp's stride");
    }
}

TEST("gate, up and down may each have other codes") {
    for (std::size_t i = 0; i < cases().size(); i += 2) {
        EncodedCase c = all(cases()[i], BF16, 2, 256, 256, 24);
        c.up = cases()[(i + 5) % cases().size()];
        c.down = cases()[(i + 11) % cases().size()];
        check_close(c, described(c.gate) + " and others");
        c.T = 10;
        check_close(c, described(c.gate) + " and others");
    }
}

TEST("pairs are bit-identical however experts are spread over calls, and beside other rows") {
    for (const CodesCase& codes : {CodesCase{Codes::kQ4_K}, CodesCase{Codes::kAwq, ScaleType::kBFloat16, 1, 32},
                                   CodesCase{Codes::kQ3_K}, CodesCase{Codes::kE2M1, ScaleType::kE8M0, 1, 32}}) {
        for (const auto& [most, few] : {std::pair{8, 3}, std::pair{20, 9}}) {
            EncodedProblem p(all(codes, BF16, most), 1, kAlignment);
            const std::vector<float> want = run_on_device(p);
            std::vector<std::vector<std::int32_t>> tables;
            for (std::int64_t e = p.c.E - 1; e >= 0; --e) {
                tables.emplace_back(p.slot_of.size(), -1);
                tables.back()[e] = p.slot_of[e];
            }
            CHECK(same_bits(DeviceProblem(p).run(tables), want));
            p.c.T = few;
            const std::vector<float> some = run_on_device(p);
            CHECK(std::memcmp(some.data(), want.data(), some.size() * sizeof(float)) == 0);
        }
    }
}

TEST("hidden states that are not 16-byte aligned are read right on both paths") {
    for (const DType dtype : {BF16, F16, F32}) {
        for (const std::int64_t T : {2, 12}) {
            const EncodedProblem p(all(kCodesCases[3], dtype, T, 64, 64), 1, kAlignment);
            DeviceProblem d(p);
            const auto shift = static_cast<std::size_t>(itemsize(dtype));
            std::vector<std::byte> moved(p.hidden.size() + shift);
            std::memcpy(moved.data() + shift, p.hidden.data(), p.hidden.size());
            const DeviceBytes elsewhere(moved, d.stream.get());
            const std::vector<float> want = d.run(p.slot_of);
            d.op.hidden = elsewhere.as() + shift;
            CHECK(same_bits(d.run(p.slot_of), want));
        }
    }
}

TEST("what a GPU does not decode is refused with the codes and the value in the way") {
    const auto refused = [](const EncodedCase& c, const std::string& words, std::int64_t alignment = kAlignment) {
        const EncodedProblem p(c, 1, alignment);
        const std::string reason = cuda::refusal(p.layout);
        if (reason.find(words) == std::string::npos) test::fail(__FILE__, __LINE__, "'" + reason + "' lacks " + words);
        CHECK(!cuda::tiles_possible(p.layout, p.slot_bytes));
        DeviceProblem d(p);
        std::byte workspace[1];
        CHECK_ERROR(ErrorKind::kConfig, cuda::route(d.op, workspace, d.stream.get()));
    };
    refused(all({Codes::kInt8, ScaleType::kFloat32, 7, 20}, F32, 1),
            "its gate is int8 with groups of columns of size 20");
    refused(all({Codes::kE4M3, ScaleType::kFloat32, 1, 0}, F32, 1, 256, 44), "its down is e4m3 with rows of length 44");
    refused(all({Codes::kQ8_0}, F32, 1), "its gate is q8_0 with codes at byte", 1);
    EncodedProblem p(all({Codes::kQ8_0}, F32, 1), 1, kAlignment);
    p.slot_bytes += 8;
    std::byte workspace[1];
    const Error error = ERROR_OF(cuda::route(DeviceProblem(p).op, workspace, test::test_stream().get()));
    CHECK(error.message.find("slot_bytes=") != std::string::npos);
}

EMOE_TEST_MAIN
