#include "cpu/gather_mlp.hpp"

#include <algorithm>
#include <chrono>
#include <cstring>
#include <memory>
#include <numeric>

#include "core/error.hpp"
#include "core/parallel.hpp"
#include "cpu/kernels.hpp"
#include "cpu/scratch.hpp"
#include "cpu/tasks.hpp"

namespace emoe::cpu {
namespace {

// Columns of one narrow task of rows: enough to amortize a task, few enough to share one expert among threads.
constexpr std::int64_t kRowTask = 32;

float weight_at(const void* weights, DType dtype, std::int64_t i) {
    if (dtype == DType::kFloat32) return static_cast<const float*>(weights)[i];
    const std::uint16_t half = static_cast<const std::uint16_t*>(weights)[i];
    return dtype == DType::kBFloat16 ? bf16_to_float(half) : f16_to_float(half);
}

// The pairs of this call, sorted by expert, then by position.
struct Routed {
    std::vector<std::int64_t> begin;  // [E + 1]
    std::vector<std::int64_t> token;
    std::vector<std::int64_t> out_row;
    std::vector<float> weight;
};

Routed route(const GatherMlp& op) {
    const auto experts = static_cast<std::int64_t>(op.slot_of.size());
    const auto takes_part = [&](std::int64_t id) { return id >= 0 && id < experts && op.slot_of[id] >= 0; };
    Routed routed;
    routed.begin.assign(static_cast<std::size_t>(experts + 1), 0);
    for (std::int64_t p = 0; p < op.tokens * op.top_k; ++p) {
        if (takes_part(op.index[p])) ++routed.begin[op.index[p] + 1];
    }
    std::partial_sum(routed.begin.begin(), routed.begin.end(), routed.begin.begin());
    const std::int64_t pairs = routed.begin.back();
    routed.token.resize(pairs);
    routed.out_row.resize(pairs);
    routed.weight.resize(pairs);
    std::vector<std::int64_t> next(routed.begin.begin(), routed.begin.end() - 1);
    for (std::int64_t t = 0; t < op.tokens; ++t) {
        const std::int64_t* ids = op.index + t * op.top_k;
        for (std::int64_t k = 0; k < op.top_k; ++k) {
            if (!takes_part(ids[k])) continue;
            const std::int64_t at = next[ids[k]]++;
            routed.token[at] = t;
            routed.weight[at] = weight_at(op.weights, op.weights_dtype, t * op.top_k + k);
            routed.out_row[at] = t;
            if (op.mode == OutMode::kAccumulate) continue;
            std::int64_t rank = 0;  // over all K ids, also those of other calls
            for (std::int64_t j = 0; j < op.top_k; ++j) rank += ids[j] < ids[k] || (ids[j] == ids[k] && j < k);
            routed.out_row[at] = t * op.top_k + rank;
        }
    }
    return routed;
}

std::int64_t units_of(bool pairs, std::int64_t depth) { return pairs ? (depth + 1) / 2 : depth; }

// Rows of the largest wide chunk whose x and h fit into the scratch of one group.
std::int64_t wide_rows(const MlpLayout& a, bool pairs, std::int64_t lanes) {
    const std::int64_t per_row = units_of(pairs, a.hidden) + units_of(pairs, a.intermediate);
    const std::int64_t fit = kGroupUnits / per_row / (2 * lanes) * (2 * lanes);
    return std::clamp<std::int64_t>(fit, 2 * lanes, kWideRows);
}

std::vector<Chunk> cut(const GatherMlp& op, const Routed& routed, bool pairs, const Kernels& kernels) {
    const std::int64_t most = wide_rows(op.layout, pairs, kernels.lanes);
    const int narrow = narrow_rows(op, kernels);
    std::vector<Chunk> chunks;
    for (std::size_t e = 0; e < op.slot_of.size(); ++e) {
        const std::int64_t begin = routed.begin[e];
        const std::int64_t rows = routed.begin[e + 1] - begin;
        const bool wide = rows > narrow;  // of the whole expert: a short last chunk stays on the same path
        for (std::int64_t at = 0; at < rows; at += most) {
            const std::int64_t count = std::min(most, rows - at);
            Chunk chunk{};
            chunk.slot = reinterpret_cast<const unsigned char*>(op.slab) + op.slot_of[e] * op.slot_bytes;
            chunk.token = routed.token.data() + begin + at;
            chunk.out_row = routed.out_row.data() + begin + at;
            chunk.weight = routed.weight.data() + begin + at;
            chunk.rows = static_cast<int>(count);
            chunk.padded = static_cast<int>(round_up(count, kernels.lanes));
            chunk.wide = wide;
            chunks.push_back(chunk);
        }
    }
    return chunks;
}

// Units of x, then of x and h together.
std::pair<std::int64_t, std::int64_t> sizes_of(const Chunk& chunk, const MlpLayout& a, bool pairs) {
    if (!chunk.wide && a.encoded) {
        const auto units = [&](std::int64_t depth) { return chunk.rows * encoded_stride(depth); };
        return {units(a.hidden), units(a.hidden) + units(a.intermediate)};
    }
    if (!chunk.wide) {
        const std::int64_t x = chunk.rows * round_up(a.hidden, kRowPad);
        return {x, x + chunk.rows * round_up(a.intermediate, kRowPad)};
    }
    const std::int64_t x = round_up(chunk.padded * units_of(pairs, a.hidden), 16);
    return {x, x + round_up(chunk.padded * units_of(pairs, a.intermediate), 16)};
}

// fn(chunk, first column, end) over every chunk and block of columns.
template <typename Fn>
void for_blocks(std::span<const Chunk> chunks, std::int64_t columns, std::int64_t block, Fn&& fn) {
    const std::int64_t blocks = (columns + block - 1) / block;
    parallel_for(blocks * static_cast<std::int64_t>(chunks.size()), [&](std::int64_t i) {
        const std::int64_t from = i % blocks * block;
        fn(chunks[i / blocks], from, std::min(columns, from + block));
    });
}

// The weights of a narrow row lie far from each other, those of neighbouring rows side by side.
bool by_columns(const MlpLayout& a) {
    if (!a.encoded) return a.transposed;
    const auto columns = [](const Weights& w) { return codes_row(w.codes).in == CodesIn::kColumns; };
    return columns(a.gate) || (a.has_gate && columns(a.up)) || columns(a.down);
}

// Columns of one task.
std::int64_t task_of(const MlpLayout& a, std::span<const Chunk> chunks) {
    const bool any_narrow = std::any_of(chunks.begin(), chunks.end(), [](const Chunk& c) { return !c.wide; });
    if (!any_narrow) return kRowTask;
    const auto count = static_cast<std::int64_t>(chunks.size());
    if (by_columns(a)) return a.encoded ? column_task(a.intermediate, count) : kLeastColumns;
    if (!a.encoded) return kRowTask;
    return encoded_task(kRowTask, (a.intermediate + kRowTask - 1) / kRowTask * count);
}

// `alike`: the chunks have the same x.
void run_group(const Job& job, std::span<const Chunk> chunks, bool alike, const Kernels& kernels) {
    const MlpLayout& a = *job.layout;
    const std::span<const Chunk> loaded = alike ? chunks.first(1) : chunks;
    const std::int64_t rows = std::accumulate(loaded.begin(), loaded.end(), std::int64_t{0},
                                              [](std::int64_t sum, const Chunk& c) { return sum + c.rows; });
    if (rows * a.hidden <= kSerialElements) {
        for (const Chunk& chunk : loaded) kernels.load_rows(job, chunk, 0, a.hidden);
    } else {
        for_blocks(loaded, a.hidden, 4 * kSubBlock, [&](const Chunk& chunk, std::int64_t k0, std::int64_t k1) {
            kernels.load_rows(job, chunk, k0, k1);
        });
    }
    const std::int64_t task = task_of(a, chunks);
    for_blocks(chunks, a.intermediate, task,
               [&](const Chunk& chunk, std::int64_t i0, std::int64_t i1) { kernels.gate_up(job, chunk, i0, i1); });
    if (!job.accumulate) {
        for_blocks(chunks, a.hidden_out, 2 * task,
                   [&](const Chunk& chunk, std::int64_t n0, std::int64_t n1) { kernels.down(job, chunk, n0, n1); });
        return;
    }
    // Several experts add to one row: a block of columns belongs to one thread, experts in ascending order.
    const std::int64_t block = 2 * (by_columns(a) ? task : kRowTask);
    parallel_for((a.hidden_out + block - 1) / block, [&](std::int64_t b) {
        const std::int64_t from = b * block;
        for (const Chunk& chunk : chunks) kernels.down(job, chunk, from, std::min(a.hidden_out, from + block));
    });
}

}  // namespace

bool supports(const MlpLayout& layout) noexcept {
    try {
        validate(layout);
    } catch (...) {
        return false;
    }
    return layout.encoded || layout.dtype == DType::kFloat32 || layout.dtype == DType::kBFloat16 ||
           layout.dtype == DType::kFloat16;
}

int narrow_rows(const GatherMlp& op, const Kernels& kernels) {
    const MlpLayout& a = op.layout;
    if (!a.encoded) return kNarrowRows;
    const auto whole = [](const Weights& w) {
        const CodesIn in = codes_row(w.codes).in;
        return in == CodesIn::kBlocks || in == CodesIn::kNibbles || in == CodesIn::kWords || w.codes == Codes::kInt8 ||
               w.codes == Codes::kUInt8B128;
    };
    const bool all = whole(a.gate) && (!a.has_gate || whole(a.up)) && whole(a.down);
    return all && op.hidden_dtype != DType::kFloat32 ? kernels.encoded_rows : kEncodedRows;
}

void gather_mlp(const GatherMlp& op) { gather_mlp(op, active_kernels()); }

void gather_mlp(const GatherMlp& op, const Kernels& kernels) {
    validate(op);
    if (op.tokens == 0) return;
    const bool pairs = kernels.bf16_pairs && op.hidden_dtype == DType::kBFloat16 &&
                       (op.layout.encoded || op.layout.dtype == DType::kBFloat16);
    const Routed routed = route(op);
    std::vector<Chunk> chunks = cut(op, routed, pairs, kernels);
    Job job{};
    job.layout = &op.layout;
    job.hidden = op.hidden;
    job.hidden_dtype = op.hidden_dtype;
    job.out = op.out;
    job.accumulate = op.mode == OutMode::kAccumulate;
    job.pairs = pairs;

    // Each expert meets the same row, once.
    const bool alike =
        op.tokens == 1 && std::all_of(chunks.begin(), chunks.end(), [](const Chunk& c) { return c.rows == 1; });
    thread_local Scratch scratch;
    for (std::size_t first = 0; first < chunks.size();) {
        std::int64_t units = 0;
        std::size_t end = first;
        for (; end < chunks.size(); ++end) {
            const std::int64_t more = sizes_of(chunks[end], op.layout, pairs).second;
            if (end > first && units + more > kGroupUnits) break;
            units += more;
        }
        std::uint32_t* at = scratch.take(units);
        for (std::size_t c = first; c < end; ++c) {
            const auto [x, both] = sizes_of(chunks[c], op.layout, pairs);
            chunks[c].x = alike && c > first ? chunks[first].x : at;
            chunks[c].h = at + x;
            at += both;
        }
        run_group(job, std::span(chunks).subspan(first, end - first), alike, kernels);
        first = end;
    }
}

void combine(const float* pairs, std::int64_t tokens, std::int64_t top_k, std::int64_t hidden_out, void* out,
             DType out_dtype) {
    combine(pairs, tokens, top_k, hidden_out, out, out_dtype, active_kernels());
}

void combine(const float* pairs, std::int64_t tokens, std::int64_t top_k, std::int64_t hidden_out, void* out,
             DType out_dtype, const Kernels& kernels) {
    const bool known = out_dtype == DType::kFloat32 || out_dtype == DType::kBFloat16 || out_dtype == DType::kFloat16;
    if (!known) {
        throw Error(ErrorKind::kConfig,
                    "out_dtype '" + std::string(dtype_name(out_dtype)) + "' is not one of: float32, float16, bfloat16");
    }
    if (tokens < 0 || top_k < 1 || hidden_out < 1) {
        throw Error(ErrorKind::kConfig, "combine needs tokens >= 0, top_k >= 1 and hidden_out >= 1");
    }
    if (tokens == 0) return;
    if (pairs == nullptr || out == nullptr) throw Error(ErrorKind::kConfig, "pairs_ptr or out_ptr is 0");
    auto* bytes = static_cast<unsigned char*>(out);
    const auto one = [&](std::int64_t t) {
        kernels.combine(pairs + t * top_k * hidden_out, top_k, hidden_out, bytes + t * hidden_out * itemsize(out_dtype),
                        out_dtype);
    };
    if (tokens * top_k * hidden_out <= kSerialElements) {
        for (std::int64_t t = 0; t < tokens; ++t) one(t);
    } else {
        parallel_for(tokens, one);
    }
}

void gather_sum(GatherMlp op, void* out) {
    validate(op);
    thread_local Scratch scratch;
    const std::int64_t elements = op.tokens * op.top_k * op.layout.hidden_out;
    op.out = reinterpret_cast<float*>(scratch.take(elements));
    op.mode = OutMode::kPairs;
    std::fill_n(op.out, elements, 0.0F);
    gather_mlp(op);
    combine(op.out, op.tokens, op.top_k, op.layout.hidden_out, out, op.hidden_dtype);
}

double read_seconds(const void* data, std::int64_t bytes) {
    constexpr std::int64_t kBlock = 1 << 20;
    const Kernels& kernels = active_kernels();
    const std::int64_t blocks = (bytes + kBlock - 1) / kBlock;
    std::vector<float> sums(static_cast<std::size_t>(blocks));  // kept, so that no load can be left out
    const auto start = std::chrono::steady_clock::now();
    parallel_for(blocks, [&](std::int64_t b) {
        sums[b] =
            kernels.read(static_cast<const unsigned char*>(data) + b * kBlock, std::min(kBlock, bytes - b * kBlock));
    });
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

}  // namespace emoe::cpu
