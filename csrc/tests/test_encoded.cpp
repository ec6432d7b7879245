// Conformance of the kernels for encoded experts: every unit and every kind of codes against the fp64 reference.
#include <algorithm>
#include <set>

#include "core/parallel.hpp"
#include "cpu/gather_mlp.hpp"
#include "cpu/kernels.hpp"
#include "tests/check.hpp"
#include "tests/encoded_cases.hpp"

using namespace emoe;
using emoe::test::BF16;
using emoe::test::CodesCase;
using emoe::test::EncodedCase;
using emoe::test::EncodedProblem;
using emoe::test::F16;
using emoe::test::F32;
using emoe::test::kCodesCases;

namespace {

std::vector<float> run(const EncodedProblem& p, const cpu::Kernels& kernels, OutMode mode = OutMode::kPairs) {
    const std::int64_t rows = mode == OutMode::kPairs ? p.c.T * p.c.K : p.c.T;
    std::vector<float> out(static_cast<std::size_t>(rows * p.c.Ho));
    cpu::gather_mlp(p.op(out.data(), mode), kernels);
    return out;
}

template <typename Fn>
void for_each_isa(Fn&& fn) {
    for (const std::string& isa : cpu::available_isas()) fn(cpu::kernels_named(isa));
}

// Relative to the largest value (docs/kernels.md): half rows that meet integers are 16-bit integers, the pairs of many
// bf16 rows are bf16, rows in float32 are not rounded.
double tolerance(const EncodedProblem& p, const cpu::Kernels& kernels) {
    if (kernels.bf16_pairs && p.c.hidden == BF16) return 8e-3;
    return std::string(kernels.name) == "scalar" || p.c.hidden == F32 ? 4e-6 : 4e-4;
}

void check_close(const EncodedProblem& p, const std::vector<double>& want, const cpu::Kernels& kernels,
                 const std::string& what) {
    const std::vector<float> got = run(p, kernels);
    double largest = 1e-30;
    for (const double value : want) largest = std::max(largest, std::fabs(value));
    for (std::size_t i = 0; i < got.size(); ++i) {
        const double error = std::fabs(got[i] - want[i]) / largest;
        if (error <= tolerance(p, kernels)) continue;  // false also for NaN
        throw std::runtime_error(std::string(kernels.name) + ", " + what + ": element " + std::to_string(i) + " is " +
                                 std::to_string(got[i]) + ", not " + std::to_string(want[i]) + " (error " +
                                 std::to_string(error) + ")");
    }
}

void check_every_isa(const EncodedProblem& p, const std::string& what) {
    const std::vector<double> want = test::reference(p);
    for_each_isa([&](const cpu::Kernels& kernels) { check_close(p, want, kernels, what); });
}

bool same_bits(const std::vector<float>& a, const std::vector<float>& b) {
    return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
}

EncodedCase all(const CodesCase& codes, DType hidden, std::int64_t T, std::int64_t H = 256, std::int64_t I = 256,
                std::int64_t Ho = 40) {
    return {codes, codes, codes, hidden, T, 2, 3, H, I, Ho};
}

}  // namespace

// ThreadSanitizer finds nothing in arithmetic, and is slow: a few codes stand for all.
#if defined(__SANITIZE_THREAD__)
constexpr std::size_t kEvery = 6;
#else
constexpr std::size_t kEvery = 1;
#endif

std::vector<CodesCase> cases() {
    std::vector<CodesCase> chosen;
    for (std::size_t i = 0; i < std::size(kCodesCases); i += kEvery) chosen.push_back(kCodesCases[i]);
    return chosen;
}

TEST("every unit agrees with the fp64 reference on all codes, with few rows and many") {
    for (const CodesCase& codes : cases()) {
        for (const DType hidden : {F32, BF16, F16}) {
            for (const std::int64_t T : {1, 6, 30, 60}) {  // an expert has two thirds of them
                if (hidden == F32 ? T == 60 : T == 6) continue;
                const EncodedProblem p(all(codes, hidden, T, 512));
                check_every_isa(p, described(codes) + ", tokens " + std::to_string(T));
            }
        }
    }
}

TEST("a product is off by no more than what rounding each x to 2^-16 of the largest of its 32 can do") {
    for (const CodesCase& codes : kCodesCases) {
        EncodedCase c = all(codes, BF16, 3, 512, 32, 32);
        c.down = {Codes::kFloat32};
        c.has_gate = false;
        c.K = c.E = 1;
        EncodedProblem p(c);
        p.layout.activation = Activation::kIdentity;
        for (std::int64_t i = 0; i < c.I * c.Ho; ++i) {  // out is what the first matrix gives
            test::put(p.slab.data() + p.layout.down.data + 4 * i, F32, i % (c.I + 1) == 0 ? 1.0F : 0.0F);
        }
        const std::vector<double> want = test::reference(p);
        std::vector<float> row(static_cast<std::size_t>(c.H));
        const auto* slot = reinterpret_cast<const unsigned char*>(p.slab.data());
        for_each_isa([&](const cpu::Kernels& kernels) {
            const std::vector<float> got = run(p, kernels);
            for (std::int64_t r = 0; r < c.Ho; ++r) {
                cpu::expand(p.layout.gate, slot, r, 0, c.H, row.data());
                for (std::int64_t t = 0; t < c.T; ++t) {
                    double bound = 0.0;
                    double size = 0.0;
                    for (std::int64_t g = 0; g < c.H; g += 32) {
                        double most = 0.0;
                        double sum = 0.0;
                        for (std::int64_t k = g; k < g + 32; ++k) {
                            const double x = test::value_at(p.hidden.data() + (t * c.H + k) * 2, BF16);
                            most = std::max(most, std::fabs(x));
                            sum += std::fabs(row[k]);
                            size += std::fabs(x * row[k]);
                        }
                        bound += most * sum / 65534.0;
                    }
                    const double error = std::fabs(got[t * c.Ho + r] - want[t * c.Ho + r]);
                    CHECK(error <= p.weights[t] * (bound + 2e-6 * size));
                }
            }
        });
    }
}

TEST("interleaved rows, biases and experts without a gate agree with the fp64 reference") {
    for (const CodesCase& codes : cases()) {
        for (const std::int64_t T : {2, 30}) {
            EncodedCase c = all(codes, F32, T, 256, 256, 48);
            c.bias = true;
            c.interleaved = true;
            EncodedCase other = c;
            other.has_gate = other.interleaved = false;
            check_every_isa(EncodedProblem(c), described(codes) + ", interleaved");
            check_every_isa(EncodedProblem(other), described(codes) + ", no gate");
        }
    }
}

TEST("depths that end within a vector, a group or a step of groups agree with the fp64 reference") {
    for (const CodesCase& codes : cases()) {
        const CodesRow& row = codes_row(codes.codes);
        for (const std::int64_t depth : {32, 96, 288, 608, 43}) {
            const std::int64_t group =
                row.in == CodesIn::kColumns || row.in == CodesIn::kNibbles ? codes.scale_cols : 1;
            if (depth % row.values != 0 || (group > 0 && depth % group != 0)) continue;
            if (row.in == CodesIn::kColumns && depth % 8 != 0) continue;
            for (const std::int64_t T : {1, 7, 30}) {
                EncodedCase c = all(codes, F32, T, depth, depth, 24);
                c.K = 1;
                c.E = 1;
                const EncodedProblem p(c);
                check_every_isa(p, described(codes) + ", depth " + std::to_string(depth));
            }
        }
    }
}

TEST("gate, up and down may each have other codes") {
    for (std::size_t i = 0; i < std::size(kCodesCases); ++i) {
        EncodedCase c = all(kCodesCases[i], F32, 3);
        c.up = kCodesCases[(i + 5) % std::size(kCodesCases)];
        c.down = kCodesCases[(i + 11) % std::size(kCodesCases)];
        const EncodedProblem p(c);
        check_every_isa(p, described(c.gate) + " and others");
    }
}

TEST("the bits of a row depend on nothing else in the call, up to as many rows as are narrow and again from there on") {
    const int before = threads();
    for (const CodesCase& codes : cases()) {
        for_each_isa([&](const cpu::Kernels& kernels) {
            for (const auto& [hidden, T] : {std::pair{F32, 16}, {F32, 40}, {BF16, 32}, {BF16, 56}}) {
                EncodedCase c = all(codes, hidden, T, 512, 256, 72);
                c.K = 1;
                c.E = 1;
                EncodedProblem p(c);
                const int narrow = cpu::narrow_rows(p.op(nullptr, OutMode::kPairs), kernels);
                CHECK(hidden == F32 ? narrow == cpu::kEncodedRows : narrow >= cpu::kEncodedRows);
                set_threads(1);
                const std::vector<float> want = run(p, kernels);
                set_threads(3);
                CHECK(same_bits(run(p, kernels), want));
                for (const std::int64_t few : {1, 2, 3, 5, 7, 8, 9, 12, 16, 17, 32, 33}) {
                    if (few >= T || (few <= narrow) != (T <= narrow)) continue;
                    p.c.T = few;
                    const std::vector<float> some = run(p, kernels);
                    CHECK(std::memcmp(some.data(), want.data(), some.size() * sizeof(float)) == 0);
                }
            }
            EncodedProblem several(all(codes, F32, 4, 256, 256, 72));
            set_threads(1);
            const std::vector<float> want = run(several, kernels);
            std::vector<float> split(want.size());
            for (std::int64_t e = several.c.E - 1; e >= 0; --e) {
                EncodedProblem one = several;
                for (std::int64_t j = 0; j < one.c.E; ++j) one.slot_of[j] = j == e ? several.slot_of[j] : -1;
                cpu::gather_mlp(one.op(split.data(), OutMode::kPairs), kernels);
            }
            CHECK(same_bits(split, want));
        });
    }
    set_threads(before);
}

TEST("what is infinite or no number stays so, and touches its own row only") {
    for (const CodesCase& codes : cases()) {
        for_each_isa([&](const cpu::Kernels& kernels) {
            for (const float bad : {INFINITY, NAN}) {
                EncodedCase c = all(codes, F32, 2);
                c.K = 1;
                c.E = 1;
                EncodedProblem p(c);
                const std::vector<float> good = run(p, kernels);
                std::memcpy(p.hidden.data() + (c.H + 5) * 4, &bad, 4);
                const std::vector<float> got = run(p, kernels);
                for (std::int64_t i = 0; i < c.Ho; ++i) {
                    CHECK_EQ(got[i], good[i]);
                    CHECK(!std::isfinite(got[c.Ho + i]));
                }
            }
        });
    }
}

TEST("weights that contradict themselves are refused, and a slot that is too small") {
    const EncodedProblem p(all(kCodesCases[3], F32, 1));
    std::vector<float> out(1000);
    const auto refused = [&](auto&& change) {
        GatherMlp op = p.op(out.data(), OutMode::kPairs);
        change(op);
        CHECK_ERROR(ErrorKind::kConfig, cpu::gather_mlp(op));
    };
    refused([](GatherMlp& op) { op.slot_bytes -= 4; });
    refused([](GatherMlp& op) { op.layout.gate.depth -= 32; });
    refused([](GatherMlp& op) { op.layout.gate.count += 1; });
    refused([](GatherMlp& op) { op.layout.up.first = 1; });
    refused([](GatherMlp& op) { op.layout.down.data = -1; });
    refused([](GatherMlp& op) { op.layout.down.scales = 0; });
    refused([](GatherMlp& op) { op.layout.down.step = 0; });
    CHECK(cpu::supports(p.layout));
    CHECK_ERROR(ErrorKind::kConfig, parse_codes("q9_0"));
    CHECK_ERROR(ErrorKind::kConfig, parse_scale("e9m0"));
    Weights w;
    CHECK_ERROR(ErrorKind::kConfig, set_plane(w, "shades", 0));
    for (const CodesRow& row : kCodes) CHECK_EQ(static_cast<int>(parse_codes(row.name)), static_cast<int>(row.codes));
}

EMOE_TEST_MAIN
