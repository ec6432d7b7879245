#include "cpu/linear.hpp"

#include <algorithm>
#include <array>
#include <numeric>
#include <optional>
#include <string>
#include <vector>

#include "core/error.hpp"
#include "core/parallel.hpp"
#include "cpu/gather_mlp.hpp"
#include "cpu/kernels.hpp"
#include "cpu/scratch.hpp"
#include "cpu/tasks.hpp"

namespace emoe::cpu {
namespace {

constexpr std::int64_t kRowTask = 64;  // outputs of one task

// fn(first, end) over blocks of columns.
template <typename Fn>
void for_blocks(std::int64_t columns, std::int64_t block, Fn&& fn) {
    parallel_for((columns + block - 1) / block,
                 [&](std::int64_t b) { fn(b * block, std::min(columns, (b + 1) * block)); });
}

// 0, 1, 2, ...: kept, since most calls have few rows.
const std::int64_t* counted(std::int64_t n) {
    thread_local std::vector<std::int64_t> numbers;
    if (const auto had = static_cast<std::int64_t>(numbers.size()); had < n) {
        numbers.resize(static_cast<std::size_t>(n));
        std::iota(numbers.begin() + had, numbers.end(), had);
    }
    return numbers.data();
}

std::int64_t narrow_task(const Weights& weights) {
    if (codes_row(weights.codes).in == CodesIn::kColumns) return column_task(weights.count, 1);
    return encoded_task(kRowTask, (weights.count + kRowTask - 1) / kRowTask);
}

// A layer that is computed: an expert of one matrix, whose rows meet `gate` only.
struct Layer {
    MlpLayout layout;
    Job job{};
    LinearOut out{};

    Layer(const Linear& op, const Kernels& kernels) {
        validate(op);
        layout.encoded = true;
        layout.has_gate = false;
        layout.hidden = op.weights.depth;
        layout.gate = op.weights;
        job.layout = &layout;
        job.hidden = op.x;
        job.hidden_dtype = op.dtype;
        job.pairs = kernels.bf16_pairs && op.dtype == DType::kBFloat16;
        out = {op.y, op.bias, op.bias_dtype};
    }
    Layer(const Layer&) = delete;
    Layer& operator=(const Layer&) = delete;
};

Chunk chunk_of(const Linear& op, std::int64_t first, std::int64_t rows, bool wide, const Kernels& kernels) {
    Chunk chunk{};
    chunk.slot = reinterpret_cast<const unsigned char*>(op.base);
    chunk.rows = static_cast<int>(rows);
    chunk.padded = static_cast<int>(round_up(rows, kernels.lanes));
    chunk.wide = wide;
    chunk.token = chunk.out_row = counted(op.tokens) + first;
    return chunk;
}

void load(const Layer& layer, const Chunk& chunk, const Kernels& kernels) {
    const std::int64_t depth = layer.layout.hidden;
    if (chunk.rows * depth <= kSerialElements) return kernels.load_rows(layer.job, chunk, 0, depth);
    for_blocks(depth, 4 * kSubBlock,
               [&](std::int64_t k0, std::int64_t k1) { kernels.load_rows(layer.job, chunk, k0, k1); });
}

// Whether two kinds of weights want the same of x.
bool meets_alike(const Weights& one, const Weights& other) {
    return one.codes == other.codes && one.scale == other.scale && one.scale_rows == other.scale_rows &&
           one.scale_cols == other.scale_cols;
}

Scratch& scratch() {
    thread_local Scratch kept;
    return kept;
}

void wide_linear(const Linear& op, const Kernels& kernels) {
    const Layer layer(op, kernels);
    const std::int64_t depth = op.weights.depth;
    const std::int64_t units = layer.job.pairs ? (depth + 1) / 2 : depth;
    const std::int64_t step = 2 * kernels.lanes;
    const std::int64_t most = std::clamp<std::int64_t>(kGroupUnits / units / step * step, step, kWideRows);
    for (std::int64_t at = 0; at < op.tokens; at += most) {
        Chunk chunk = chunk_of(op, at, std::min(most, op.tokens - at), true, kernels);
        chunk.x = scratch().take(chunk.padded * units);
        load(layer, chunk, kernels);
        for_blocks(op.weights.count, kRowTask,
                   [&](std::int64_t n0, std::int64_t n1) { kernels.linear(layer.job, chunk, layer.out, n0, n1); });
    }
}

}  // namespace

void linear(const Linear& op) { linear(op, active_kernels()); }

void linear(const Linear& op, const Kernels& kernels) {
    if (op.tokens > kNarrowRows) return wide_linear(op, kernels);
    narrow_linear(std::span(&op, 1), kernels);
}

void narrow_linear(std::span<const Linear> ops, const Kernels& kernels) {
    if (ops.empty()) return;
    const Linear& first = ops.front();
    std::array<std::optional<Layer>, kMostAlike> layers;
    std::array<Chunk, kMostAlike> chunks;
    std::array<std::int64_t, kMostAlike> tasks{};     // outputs of one
    std::array<std::int64_t, kMostAlike + 1> ends{};  // of the tasks of each layer, behind a zero
    for (std::size_t i = 0; i < ops.size(); ++i) {
        const Linear& op = ops[i];
        if (i == kMostAlike || op.tokens > kNarrowRows || op.tokens != first.tokens || op.x != first.x ||
            op.dtype != first.dtype || op.weights.depth != first.weights.depth) {
            throw Error(ErrorKind::kConfig, "linear layers of one call are at most " + std::to_string(kMostAlike) +
                                                " of the same x, of at most " + std::to_string(kNarrowRows) + " rows");
        }
        layers[i].emplace(op, kernels);
        chunks[i] = chunk_of(op, 0, op.tokens, false, kernels);
        tasks[i] = narrow_task(op.weights);
        ends[i + 1] = ends[i] + (op.weights.count + tasks[i] - 1) / tasks[i];
    }
    if (first.tokens == 0) return;
    std::uint32_t* const x = scratch().take(first.tokens * encoded_stride(first.weights.depth));
    for (std::size_t i = 0; i < ops.size(); ++i) {
        chunks[i].x = x;
        const auto like = [&](const Linear& other) { return meets_alike(ops[i].weights, other.weights); };
        if (std::none_of(ops.begin(), ops.begin() + static_cast<std::ptrdiff_t>(i), like)) {
            load(*layers[i], chunks[i], kernels);  // what others need beside the numbers stays
        }
    }
    parallel_for(ends[ops.size()], [&](std::int64_t i) {
        std::size_t at = 0;
        while (i >= ends[at + 1]) ++at;
        const std::int64_t from = (i - ends[at]) * tasks[at];
        const std::int64_t end = std::min(ops[at].weights.count, from + tasks[at]);
        kernels.linear(layers[at]->job, chunks[at], layers[at]->out, from, end);
    });
}

}  // namespace emoe::cpu
