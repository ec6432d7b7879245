// Conformance of the linear layer: every unit and every kind of codes against the fp64 reference on what expand() says.
#include <algorithm>

#include "core/parallel.hpp"
#include "cpu/gather_mlp.hpp"
#include "cpu/kernels.hpp"
#include "cpu/linear.hpp"
#include "tests/check.hpp"
#include "tests/encoded_cases.hpp"

using namespace emoe;
using emoe::test::BF16;
using emoe::test::CodesCase;
using emoe::test::EncodedProblem;
using emoe::test::F16;
using emoe::test::F32;
using emoe::test::kCodesCases;

namespace {

// The first matrix of an expert as a layer of its own, its last rows and interleaved ones among the cases.
struct Layer {
    EncodedProblem p;
    Linear op;
    std::vector<std::byte> y;
    std::vector<float> bias;

    Layer(const CodesCase& codes, DType dtype, std::int64_t tokens, std::int64_t depth, std::int64_t rows,
          bool interleaved = false)
        : p({codes, codes, kCodesCases[0], dtype, tokens, 1, 1, depth, rows, 8, true, interleaved}) {
        op.weights = p.layout.up;
        op.base = p.slab.data();
        op.x = p.hidden.data();
        op.tokens = tokens;
        op.dtype = dtype;
        for (std::int64_t n = 0; n < rows; ++n) bias.push_back(p.normal());
        op.bias = bias.data();
        y.resize(static_cast<std::size_t>(tokens * rows * itemsize(dtype)));
        op.y = y.data();
    }
    const std::vector<std::byte>& run(const cpu::Kernels& kernels) {
        std::fill(y.begin(), y.end(), std::byte{0xFF});
        cpu::linear(op, kernels);
        return y;
    }
    double got(std::int64_t i) const { return test::value_at(y.data() + i * itemsize(op.dtype), op.dtype); }
};

std::vector<double> reference(const Layer& layer) {
    const Linear& op = layer.op;
    const auto* slot = reinterpret_cast<const unsigned char*>(op.base);
    const auto* x = static_cast<const std::byte*>(op.x);
    std::vector<float> row(static_cast<std::size_t>(op.weights.depth));
    std::vector<double> want(static_cast<std::size_t>(op.tokens * op.weights.count));
    for (std::int64_t n = 0; n < op.weights.count; ++n) {
        cpu::expand(op.weights, slot, n, 0, op.weights.depth, row.data());
        for (std::int64_t t = 0; t < op.tokens; ++t) {
            double sum = op.bias == nullptr ? 0.0 : layer.bias[static_cast<std::size_t>(n)];
            for (std::int64_t k = 0; k < op.weights.depth; ++k) {
                sum += test::value_at(x + (t * op.weights.depth + k) * itemsize(op.dtype), op.dtype) *
                       row[static_cast<std::size_t>(k)];
            }
            want[static_cast<std::size_t>(t * op.weights.count + n)] = sum;
        }
    }
    return want;
}

double tolerance(const Linear& op, const cpu::Kernels& kernels) {
    if (op.dtype == BF16) return 8e-3;
    if (op.dtype == F16) return 1e-3;
    return std::string(kernels.name) == "scalar" ? 4e-6 : 1e-4;
}

template <typename Fn>
void for_each_isa(Fn&& fn) {
    for (const std::string& isa : cpu::available_isas()) fn(cpu::kernels_named(isa));
}

void check_every_isa(Layer& layer, const std::string& what) {
    const std::vector<double> want = reference(layer);
    double largest = 1e-30;
    for (const double value : want) largest = std::max(largest, std::fabs(value));
    for_each_isa([&](const cpu::Kernels& kernels) {
        layer.run(kernels);
        for (std::size_t i = 0; i < want.size(); ++i) {
            const double value = layer.got(static_cast<std::int64_t>(i));
            if (std::fabs(value - want[i]) / largest <= tolerance(layer.op, kernels)) continue;  // false also for NaN
            throw std::runtime_error(std::string(kernels.name) + ", " + what + ": element " + std::to_string(i) +
                                     " is " + std::to_string(value) + ", not " + std::to_string(want[i]));
        }
    });
}

}  // namespace

TEST("every unit agrees with the fp64 reference on all codes, with few rows and many") {
    for (const CodesCase& codes : kCodesCases) {
        for (const DType dtype : {F32, BF16, F16}) {
            for (const std::int64_t tokens : {1, 8, 30}) {
                if (dtype != F32 && tokens == 8) continue;
                Layer layer(codes, dtype, tokens, 512, 72);
                check_every_isa(layer, described(codes) + ", tokens " + std::to_string(tokens));
            }
        }
    }
}

TEST("sizes that divide by nothing, rows that lie two apart, no bias, and more rows than a chunk has") {
    const CodesCase plain{Codes::kBFloat16};
    const CodesCase bytes{Codes::kE4M3, ScaleType::kFloat32, 3, 24};
    for (const CodesCase& codes : {plain, bytes, CodesCase{Codes::kFloat32}}) {
        for (const DType dtype : {F32, BF16}) {
            for (const std::int64_t tokens : {1, 9, 300}) {
                Layer layer(codes, dtype, tokens, 203, 77);
                check_every_isa(layer, "203 by 77");
                Layer apart(codes, dtype, tokens, 45, 131, true);
                apart.op.bias = nullptr;
                check_every_isa(apart, "two apart");
            }
        }
    }
}

TEST("up to eight rows, each has the bits that it has alone, with one thread and with several") {
    const int before = threads();
    for (const CodesCase& codes : kCodesCases) {
        for_each_isa([&](const cpu::Kernels& kernels) {
            Layer layer(codes, F32, 8, 512, 1040);
            const std::vector<std::byte> together = layer.run(kernels);
            for (const int team : {1, 3}) {
                set_threads(team);
                CHECK(layer.run(kernels) == together);
            }
            set_threads(before);
            layer.op.tokens = 1;
            for (std::int64_t t = 0; t < 8; ++t) {
                layer.op.x = layer.p.hidden.data() + t * 512 * 4;
                const std::vector<std::byte>& alone = layer.run(kernels);
                CHECK(std::equal(alone.begin(), alone.begin() + 1040 * 4, together.begin() + t * 1040 * 4));
            }
        });
    }
}

TEST("what contradicts itself is refused") {
    Layer layer(kCodesCases[0], F32, 1, 64, 8);
    layer.op.tokens = -1;
    CHECK_ERROR(ErrorKind::kConfig, cpu::linear(layer.op));
    layer.op.tokens = 1;
    layer.op.x = nullptr;
    CHECK_ERROR(ErrorKind::kConfig, cpu::linear(layer.op));
    layer.op.x = layer.p.hidden.data();
    layer.op.dtype = parse_dtype("int32");
    CHECK_ERROR(ErrorKind::kConfig, cpu::linear(layer.op));
    layer.op.dtype = F32;
    layer.op.bias_dtype = parse_dtype("int64");
    CHECK_ERROR(ErrorKind::kConfig, cpu::linear(layer.op));
}

EMOE_TEST_MAIN
