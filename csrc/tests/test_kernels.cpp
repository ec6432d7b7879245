// Conformance: one table of cases, every instruction-set unit against the fp64 reference.
#include <algorithm>
#include <cstdlib>
#include <iostream>
#include <set>

#include "core/parallel.hpp"
#include "cpu/gather_mlp.hpp"
#include "cpu/kernels.hpp"
#include "tests/check.hpp"
#include "tests/kernel_cases.hpp"

using namespace emoe;
using emoe::test::BF16;
using emoe::test::F16;
using emoe::test::F32;
using emoe::test::kCases;
using emoe::test::MlpCase;
using emoe::test::Problem;

namespace {

constexpr const char* kAllIsas[] = {"avx512bf16", "avx512", "avx2", "scalar"};

std::vector<float> run(const Problem& p, const cpu::Kernels& kernels, OutMode mode = OutMode::kPairs) {
    const std::int64_t rows = mode == OutMode::kPairs ? p.c.T * p.c.K : p.c.T;
    std::vector<float> out(static_cast<std::size_t>(rows * p.layout.hidden_out));
    cpu::gather_mlp(p.op(out.data(), mode), kernels);
    return out;
}

// Relative to the largest value: fp32 rounding only, except where the unit rounds h to bf16 (docs/kernels.md).
double tolerance(const Problem& p, const cpu::Kernels& kernels) {
    return kernels.bf16_pairs && p.c.hidden == BF16 && p.c.weights == BF16 ? 8e-3 : 4e-6;
}

void check_close(const std::vector<float>& got, const std::vector<double>& want, double relative,
                 const std::string& what) {
    CHECK_EQ(got.size(), want.size());
    double largest = 1e-30;
    for (const double value : want) largest = std::max(largest, std::fabs(value));
    for (std::size_t i = 0; i < got.size(); ++i) {
        const double error = std::fabs(got[i] - want[i]) / largest;
        if (error <= relative) continue;  // false also for NaN
        throw std::runtime_error(what + ": element " + std::to_string(i) + " is " + std::to_string(got[i]) + ", not " +
                                 std::to_string(want[i]) + " (error " + std::to_string(error) + ")");
    }
}

template <typename Fn>
void for_each_isa(Fn&& fn) {
    const std::vector<std::string> here = cpu::available_isas();
    for (const char* isa : kAllIsas) {
        if (std::find(here.begin(), here.end(), isa) == here.end()) {
            static std::set<std::string> told;
            if (told.insert(isa).second) std::cout << "not supported on this CPU: " << isa << "\n";
            continue;
        }
        fn(cpu::kernels_named(isa));
    }
}

bool same_bits(const std::vector<float>& a, const std::vector<float>& b) {
    return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
}

MlpCase case_named(const std::string& what) {
    for (const MlpCase& c : kCases) {
        if (c.what == what) return c;
    }
    throw std::runtime_error("no case " + what);
}

}  // namespace

TEST("every unit agrees with the fp64 reference on every case") {
    for (const MlpCase& c : kCases) {
        const Problem p(c);
        const std::vector<double> want = test::reference(p);
        std::vector<double> sums(static_cast<std::size_t>(c.T * c.Ho));
        for (std::int64_t i = 0; i < c.T * c.K * c.Ho; ++i) sums[i / (c.K * c.Ho) * c.Ho + i % c.Ho] += want[i];
        for_each_isa([&](const cpu::Kernels& kernels) {
            const std::string what = std::string(kernels.name) + ", " + c.what;
            const std::vector<float> pairs = run(p, kernels);
            check_close(pairs, want, tolerance(p, kernels), what);
            check_close(run(p, kernels, OutMode::kAccumulate), sums, 2 * tolerance(p, kernels), what + ", accumulate");
            std::vector<float> combined(static_cast<std::size_t>(c.T * c.Ho));
            cpu::combine(pairs.data(), c.T, c.K, c.Ho, combined.data(), F32, kernels);
            check_close(combined, sums, 2 * tolerance(p, kernels), what + ", combine");
        });
    }
}

TEST("ids outside the experts and experts without a slot add nothing") {
    for_each_isa([](const cpu::Kernels& kernels) {
        for (const char* what : {"few rows, odd sizes", "many rows"}) {
            Problem p(case_named(what));
            p.index[0] = -1;
            p.index[1] = p.c.E;
            p.index[p.c.K] = std::int64_t{1} << 62;
            p.slot_of[1] = -1;
            check_close(run(p, kernels), test::reference(p), tolerance(p, kernels), what);
            std::fill(p.slot_of.begin(), p.slot_of.end(), -1);
            for (const float value : run(p, kernels)) CHECK_EQ(value, 0.0F);
        }
    });
}

TEST("no tokens and no experts are no error") {
    Problem p(case_named("one row"));
    p.c.T = 0;
    CHECK(run(p, cpu::active_kernels()).empty());
    Problem none(case_named("one row"));
    none.slot_of.clear();
    for (const float value : run(none, cpu::active_kernels())) CHECK_EQ(value, 0.0F);
}

TEST("pairs are bit-identical however experts are spread over calls and for any number of threads") {
    const int before = threads();
    for_each_isa([](const cpu::Kernels& kernels) {
        for (const MlpCase& c : kCases) {
            const Problem p(c);
            set_threads(1);
            const std::vector<float> want = run(p, kernels);
            const std::vector<float> sums = run(p, kernels, OutMode::kAccumulate);
            set_threads(3);
            CHECK(same_bits(run(p, kernels), want));
            CHECK(same_bits(run(p, kernels, OutMode::kAccumulate), sums));
            std::vector<float> split(want.size());
            for (std::int64_t e = p.c.E - 1; e >= 0; --e) {
                Problem one = p;
                for (std::int64_t j = 0; j < p.c.E; ++j) one.slot_of[j] = j == e ? p.slot_of[j] : -1;
                cpu::gather_mlp(one.op(split.data(), OutMode::kPairs), kernels);
            }
            CHECK(same_bits(split, want));
        }
    });
    set_threads(before);
}

TEST("every layout, dtype and count of rows around the narrow limit agrees with the fp64 reference") {
    const int before = threads();
    set_threads(1);
    for_each_isa([](const cpu::Kernels& kernels) {
        for (const DType weights : {F32, BF16, F16}) {
            for (const DType hidden : {F32, BF16, F16}) {
                for (int flags = 0; flags < 16; ++flags) {
                    MlpCase c{"sweep", weights, hidden, hidden, 0, 1, 1, 21, 19, 35, Activation::kSilu};
                    c.has_gate = (flags & 1) == 0;
                    c.interleaved = (flags & 2) != 0;
                    c.transposed = (flags & 4) != 0;
                    c.bias = (flags & 8) != 0;
                    if (c.interleaved && !c.has_gate) continue;
                    // The rows of one expert: alone, on either side of the narrow limit, past one and two vectors.
                    for (const std::int64_t rows : {1, 2, 7, 8, 9, 17, 33}) {
                        c.T = rows;
                        const Problem p(c, static_cast<unsigned>(flags + 1));
                        const std::string what = std::string(kernels.name) + ", weights " +
                                                 std::string(dtype_name(weights)) + ", hidden " +
                                                 std::string(dtype_name(hidden)) + ", flags " + std::to_string(flags) +
                                                 ", rows " + std::to_string(rows);
                        check_close(run(p, kernels), test::reference(p), tolerance(p, kernels), what);
                    }
                }
            }
        }
    });
    set_threads(before);
}

TEST("every activation agrees with the fp64 reference in every unit, on both paths") {
    for_each_isa([](const cpu::Kernels& kernels) {
        for (int a = 0; a <= static_cast<int>(Activation::kSiluClamped); ++a) {
            for (const std::int64_t rows : {1, 20}) {
                const MlpCase c{"activation", F32, F32, F32, rows, 1, 1, 48, 41, 48, static_cast<Activation>(a)};
                const Problem p(c);
                const std::string name(activation_name(static_cast<Activation>(a)));
                check_close(run(p, kernels), test::reference(p), 4e-6, std::string(kernels.name) + ", " + name);
            }
        }
    });
}

TEST("a row's bits do not depend on the other rows, up to 8 rows of an expert and again from 9") {
    static_assert(cpu::kNarrowRows == 8, "docs/kernels.md names this number");
    for_each_isa([](const cpu::Kernels& kernels) {
        for (const DType dtype : {F32, BF16, F16}) {
            for (const bool transposed : {false, true}) {
                MlpCase c = case_named("deeper than one depth block");
                c.weights = c.hidden = dtype;
                c.transposed = transposed;
                c.T = 8;
                Problem narrow(c);
                const std::vector<float> eight = run(narrow, kernels);
                for (std::int64_t rows = 1; rows < 8; ++rows) {
                    narrow.c.T = rows;
                    const std::vector<float> few = run(narrow, kernels);
                    CHECK(std::memcmp(few.data(), eight.data(), few.size() * sizeof(float)) == 0);
                }
                c.T = 300;
                Problem wide(c);
                const std::vector<float> many = run(wide, kernels);
                for (const std::int64_t rows : {9, 16, 33, 257}) {
                    wide.c.T = rows;
                    const std::vector<float> some = run(wide, kernels);
                    CHECK(std::memcmp(some.data(), many.data(), some.size() * sizeof(float)) == 0);
                }
            }
        }
    });
}

TEST("a token decodes to the same bits alone, in a batch of 8, in any grouping and with any number of threads") {
    const int before = threads();
    for_each_isa([](const cpu::Kernels& kernels) {
        for (const DType dtype : {F32, BF16}) {
            for (const bool transposed : {false, true}) {
                MlpCase c{"decode", dtype, dtype, dtype, 8, 3, 5, 130, 70, 90, Activation::kSilu};
                c.transposed = transposed;
                Problem batch(c);
                batch.index[3] = batch.index[4];  // an expert named twice by one token
                set_threads(1);
                const std::vector<float> want = run(batch, kernels);
                std::vector<float> sums(static_cast<std::size_t>(c.T * c.Ho));
                cpu::combine(want.data(), c.T, c.K, c.Ho, sums.data(), F32, kernels);
                const std::int64_t per_token = c.K * c.Ho;
                for (const int team : {1, 3}) {
                    set_threads(team);
                    for (std::int64_t t = 0; t < c.T; ++t) {
                        for (const std::int64_t group : {1, 2, 5}) {  // experts in one call
                            std::vector<float> out(static_cast<std::size_t>(per_token));
                            for (std::int64_t first = 0; first < c.E; first += group) {
                                Problem one = batch;
                                for (std::int64_t e = 0; e < c.E; ++e) {
                                    if (e < first || e >= first + group) one.slot_of[e] = -1;
                                }
                                GatherMlp op = one.op(out.data(), OutMode::kPairs);
                                op.tokens = 1;
                                op.hidden = one.hidden.data() + t * c.H * itemsize(dtype);
                                op.index = one.index.data() + t * c.K;
                                op.weights = one.weights.data() + t * c.K * itemsize(dtype);
                                cpu::gather_mlp(op, kernels);
                            }
                            CHECK(std::memcmp(out.data(), want.data() + t * per_token, out.size() * sizeof(float)) ==
                                  0);
                            std::vector<float> sum(static_cast<std::size_t>(c.Ho));
                            cpu::combine(out.data(), 1, c.K, c.Ho, sum.data(), F32, kernels);
                            CHECK(std::memcmp(sum.data(), sums.data() + t * c.Ho, sum.size() * sizeof(float)) == 0);
                        }
                    }
                }
            }
        }
    });
    set_threads(before);
}

TEST("huge, infinite and NaN activations stay what IEEE makes of them") {
    for_each_isa([](const cpu::Kernels& kernels) {
        for (const std::int64_t rows : {1, 20}) {
            MlpCase c{"extremes", F32, F32, F32, rows, 1, 1, 1, 1, 1, Activation::kSilu, false};
            Problem p(c);
            const float one = 1.0F;
            std::memcpy(p.slab.data() + p.layout.gate_up_offset, &one, 4);
            std::memcpy(p.slab.data() + p.layout.down_offset, &one, 4);
            std::memcpy(p.weights.data(), &one, 4);
            const auto silu = [&](float x) {
                std::memcpy(p.hidden.data(), &x, 4);
                return run(p, kernels)[0];
            };
            CHECK_EQ(silu(200.0F), 200.0F);
            CHECK(std::fabs(silu(-200.0F)) < 1e-30F);
            CHECK_EQ(silu(INFINITY), INFINITY);
            CHECK(std::isnan(silu(NAN)));
        }
    });
}

TEST("combine rounds once, to nearest even, in every dtype") {
    for_each_isa([](const cpu::Kernels& kernels) {
        std::mt19937 random(3);
        constexpr std::int64_t T = 3, K = 4, H = 37;
        std::vector<float> pairs(T * K * H);
        for (float& value : pairs) {
            // Magnitudes from f16's subnormals to past its largest value.
            value =
                std::ldexp(static_cast<float>(random()) / 4294967296.0F - 0.5F, static_cast<int>(random() % 45) - 26);
        }
        for (const DType dtype : {F32, BF16, F16}) {
            std::vector<std::byte> out(static_cast<std::size_t>(T * H * itemsize(dtype)));
            cpu::combine(pairs.data(), T, K, H, out.data(), dtype, kernels);
            for (std::int64_t i = 0; i < T * H; ++i) {
                float sum = 0.0F;
                for (std::int64_t k = 0; k < K; ++k) sum += pairs[(i / H * K + k) * H + i % H];
                std::byte want[4];
                test::put(want, dtype, sum);
                const std::byte* got = out.data() + i * itemsize(dtype);
                CHECK(std::memcmp(got, want, static_cast<std::size_t>(itemsize(dtype))) == 0);
            }
        }
    });
}

TEST("a unit that was asked for is the one that runs: different lanes add in a different order") {
    const Problem p(case_named("deeper than one depth block"));
    MlpCase narrow_case = p.c;
    narrow_case.T = 1;
    const Problem narrow(narrow_case);
    const std::vector<std::string> here = cpu::available_isas();
    for (const std::string& a : here) {
        CHECK_EQ(std::string(cpu::kernels_named(a).name), a);
        for (const std::string& b : here) {
            if (cpu::kernels_named(a).lanes == cpu::kernels_named(b).lanes) continue;
            CHECK(!same_bits(run(narrow, cpu::kernels_named(a)), run(narrow, cpu::kernels_named(b))));
        }
    }
}

TEST("an unknown instruction set is refused by name, and one this CPU lacks as unavailable") {
    const Error error = ERROR_OF(cpu::kernels_named("sse9"));
    CHECK_EQ(static_cast<int>(error.kind), static_cast<int>(ErrorKind::kConfig));
    CHECK(error.message.find("avx512bf16, avx512, avx2, scalar") != std::string::npos);
    CHECK_ERROR(ErrorKind::kConfig, cpu::kernels_named(""));
    const std::vector<std::string> here = cpu::available_isas();
    for (const char* isa : kAllIsas) {
        if (std::find(here.begin(), here.end(), isa) != here.end()) continue;
        CHECK_ERROR(ErrorKind::kBackendUnavailable, cpu::kernels_named(isa));
    }
    const char* forced = std::getenv("EMOE_FORCE_ISA");
    CHECK_EQ(std::string(cpu::active_kernels().name), forced != nullptr ? std::string(forced) : here.front());
}

TEST("layouts and calls that contradict themselves are refused") {
    const Problem p(case_named("one row"));
    std::vector<float> out(1000);
    const auto refused = [&](auto&& change) {
        GatherMlp op = p.op(out.data(), OutMode::kPairs);
        change(op);
        CHECK_ERROR(ErrorKind::kConfig, cpu::gather_mlp(op));
    };
    refused([](GatherMlp& op) { op.layout.hidden = 0; });
    refused([](GatherMlp& op) { op.layout.gate_up_offset = -1; });
    refused([](GatherMlp& op) { op.layout.has_gate = false, op.layout.interleaved = true; });
    refused([](GatherMlp& op) { op.layout.activation = Activation::kSwigluClamped, op.layout.limit = 0.0F; });
    refused([](GatherMlp& op) { op.layout.dtype = DType::kInt8; });
    refused([](GatherMlp& op) { op.hidden_dtype = DType::kFloat64; });
    refused([](GatherMlp& op) { op.weights_dtype = DType::kInt64; });
    refused([](GatherMlp& op) { op.slot_bytes -= 1; });
    refused([](GatherMlp& op) { op.top_k = 0; });
    refused([](GatherMlp& op) { op.tokens = -1; });
    refused([](GatherMlp& op) { op.out = nullptr; });
    CHECK_ERROR(ErrorKind::kConfig, parse_activation("swish"));
    CHECK_ERROR(ErrorKind::kConfig, parse_out_mode("sum"));
    CHECK(cpu::supports(p.layout));
    MlpLayout other = p.layout;
    other.dtype = DType::kInt8;
    CHECK(!cpu::supports(other));
}

EMOE_TEST_MAIN
