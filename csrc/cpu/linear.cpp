#include "cpu/linear.hpp"

#include <algorithm>
#include <numeric>
#include <vector>

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

}  // namespace

void linear(const Linear& op) { linear(op, active_kernels()); }

void linear(const Linear& op, const Kernels& kernels) {
    validate(op);
    if (op.tokens == 0) return;
    MlpLayout layout;  // an expert of one matrix: its rows meet `gate` only
    layout.encoded = true;
    layout.has_gate = false;
    layout.hidden = op.weights.depth;
    layout.gate = op.weights;
    Job job{};
    job.layout = &layout;
    job.hidden = op.x;
    job.hidden_dtype = op.dtype;
    job.pairs = kernels.bf16_pairs && op.dtype == DType::kBFloat16;
    const LinearOut out{op.y, op.bias, op.bias_dtype};

    const std::int64_t depth = op.weights.depth;
    const bool wide = op.tokens > kNarrowRows;
    const std::int64_t units = job.pairs ? (depth + 1) / 2 : depth;
    const std::int64_t step = 2 * kernels.lanes;
    const std::int64_t most =
        wide ? std::clamp<std::int64_t>(kGroupUnits / units / step * step, step, kWideRows) : op.tokens;
    const std::int64_t task = wide ? kRowTask : narrow_task(op.weights);
    thread_local Scratch scratch;
    for (std::int64_t at = 0; at < op.tokens; at += most) {
        Chunk chunk{};
        chunk.slot = reinterpret_cast<const unsigned char*>(op.base);
        chunk.rows = static_cast<int>(std::min(most, op.tokens - at));
        chunk.padded = static_cast<int>(round_up(chunk.rows, kernels.lanes));
        chunk.wide = wide;
        chunk.token = chunk.out_row = counted(op.tokens) + at;
        chunk.x = scratch.take(wide ? chunk.padded * units : chunk.rows * encoded_stride(depth));
        if (chunk.rows * depth <= kSerialElements) {
            kernels.load_rows(job, chunk, 0, depth);
        } else {
            for_blocks(depth, 4 * kSubBlock,
                       [&](std::int64_t k0, std::int64_t k1) { kernels.load_rows(job, chunk, k0, k1); });
        }
        for_blocks(op.weights.count, task,
                   [&](std::int64_t n0, std::int64_t n1) { kernels.linear(job, chunk, out, n0, n1); });
    }
}

}  // namespace emoe::cpu
