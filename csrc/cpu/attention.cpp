#include "cpu/attention.hpp"

#include <algorithm>

#include "core/parallel.hpp"
#include "cpu/gather_mlp.hpp"
#include "cpu/kernels.hpp"
#include "cpu/scratch.hpp"

namespace emoe::cpu {
namespace {

constexpr std::int64_t kSerialElements = 1 << 15;  // up to here a second thread costs more than it saves
constexpr std::int64_t kNormTask = 8;              // rows of one task

template <typename Fn>
void loop(std::int64_t n, bool serial, Fn&& fn) {
    if (!serial) return parallel_for(n, fn);
    for (std::int64_t i = 0; i < n; ++i) fn(i);
}

std::int64_t up(std::int64_t n, std::int64_t unit) { return (n + unit - 1) / unit * unit; }

}  // namespace

void attend(const Attention& op) { attend(op, active_kernels()); }

void attend(const Attention& op, const Kernels& kernels) {
    validate(op);
    const std::int64_t group = op.heads / op.kv_heads;
    const std::int64_t parts = (op.keys + kAttentionKeys - 1) / kAttentionKeys;
    const std::int64_t sets = op.batch * op.kv_heads;  // heads of keys and values, each with its group of queries
    AttentionWork work{};
    work.op = &op;
    work.parts = parts;
    work.query_stride = up(op.depth, kHeadPad);
    work.sum_stride = 2 + up(op.value_depth, kHeadPad);
    const std::int64_t scores = sets * parts * group * kAttentionKeys;
    const std::int64_t sums = sets * parts * group * work.sum_stride;
    thread_local Scratch scratch;
    auto* taken = reinterpret_cast<float*>(scratch.take(op.batch * op.heads * work.query_stride + scores + sums));
    work.queries = taken;
    work.scores = work.queries + op.batch * op.heads * work.query_stride;
    work.sums = work.scores + scores;
    const std::int64_t elements = sets * op.keys * (op.depth + op.value_depth);
    loop(sets, true, [&](std::int64_t i) { kernels.attend_load(work, i); });
    loop(sets * parts, elements <= kSerialElements,
         [&](std::int64_t i) { kernels.attend(work, i / parts, i % parts); });
    loop(sets, parts * op.batch * op.heads * op.value_depth <= kSerialElements,
         [&](std::int64_t i) { kernels.attend_store(work, i); });
}

void rms_norm(const RmsNorm& op) { rms_norm(op, active_kernels()); }

void rms_norm(const RmsNorm& op, const Kernels& kernels) {
    validate(op);
    loop((op.rows + kNormTask - 1) / kNormTask, op.rows * op.width <= kSerialElements, [&](std::int64_t i) {
        for (std::int64_t row = i * kNormTask; row < std::min(op.rows, (i + 1) * kNormTask); ++row) {
            kernels.rms_norm(op, row);
        }
    });
}

}  // namespace emoe::cpu
