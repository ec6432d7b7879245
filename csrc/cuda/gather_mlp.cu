// Launches of the kernels: which instance, which grid. The kernels are the .cuh files beside this one; sizes are
// plan.cpp; encoded weights are launched in launch_encoded.cuh.
#include <algorithm>
#include <string>

#include "core/error.hpp"
#include "cuda/combine_kernel.cuh"
#include "cuda/kernels.hpp"
#include "cuda/launch_encoded.cuh"
#include "cuda/plan.hpp"
#include "cuda/route_kernels.cuh"
#include "cuda/rows_kernel.cuh"
#include "cuda/runtime.hpp"
#include "cuda/tiles_kernel.cuh"

namespace emoe::cuda {
namespace {

// The device code spells activations and element types as numbers.
static_assert(static_cast<int>(Activation::kSilu) == 0 && static_cast<int>(Activation::kGelu) == 1 &&
              static_cast<int>(Activation::kGeluTanh) == 2 && static_cast<int>(Activation::kRelu) == 3 &&
              static_cast<int>(Activation::kRelu2) == 4 && static_cast<int>(Activation::kIdentity) == 5 &&
              static_cast<int>(Activation::kSwigluClamped) == 6 && static_cast<int>(Activation::kSiluClamped) == 7);
static_assert(sizeof(Tile) == 12 && kRowsPerTile == 4 && kTileRows == 64, "plan.cpp counts with these");

Sorted sorted_in(const Plan& made, void* workspace) {
    const Parts& parts = made.parts;
    return {part<int>(workspace, parts.token), part<int>(workspace, parts.out_row),
            part<float>(workspace, parts.sorted_weight), part<Tile>(workspace, parts.tiles),
            part<int>(workspace, parts.tile_count)};
}

Shape shape_of(const MlpLayout& a) {
    return {static_cast<int>(a.hidden),
            static_cast<int>(a.intermediate),
            static_cast<int>(a.hidden_out),
            a.has_gate,
            a.interleaved,
            static_cast<int>(a.activation),
            a.alpha,
            a.limit,
            a.gate_up_offset,
            a.gate_up_bias_offset,
            a.down_offset,
            a.down_bias_offset};
}

void require_addresses(const Mlp& op, const void* workspace) {
    const std::pair<const char*, const void*> addresses[] = {
        {"slab", op.slab},       {"slot_of", op.slot_of}, {"hidden", op.hidden},        {"index", op.index},
        {"weights", op.weights}, {"out", op.out},         {"the workspace", workspace},
    };
    for (const auto& [name, address] : addresses) {
        if (address == nullptr) throw Error(ErrorKind::kConfig, std::string(name) + " is at address 0");
    }
    const auto slab = reinterpret_cast<std::uintptr_t>(op.slab);
    if (slab % 16 != 0) throw Error(ErrorKind::kConfig, "the slab is not 16-byte aligned");
}

template <class W, bool kVector, bool kTransposed>
void launch_rows(const Mlp& op, const Plan& made, Product product, void* activations, cudaStream_t stream) {
    using Cut = RowsCut<W, kVector, kTransposed>;
    product.result = activations;
    product.blocks =
        static_cast<int>(pieces(op.layout.intermediate, op.layout.has_gate ? Cut::kLocal / 2 : Cut::kLocal));
    EMOE_LAUNCH((rows_kernel<W, kVector, kTransposed, false>), grid_size(made.tiles_bound * product.blocks),
                kRowsThreads, 0, stream, product);
    check(cudaGetLastError(), "launching gate_up for ", op.tokens, " tokens");
    product.rows = activations;
    product.row_type = kRowF32;
    product.result = op.out;
    product.blocks = static_cast<int>(pieces(op.layout.hidden_out, Cut::kLocal));
    EMOE_LAUNCH((rows_kernel<W, kVector, kTransposed, true>), grid_size(made.tiles_bound * product.blocks),
                kRowsThreads, 0, stream, product);
    check(cudaGetLastError(), "launching down for ", op.tokens, " tokens");
}

template <class W, bool kTransposed>
void launch_tiles(const Mlp& op, const Plan& made, Product product, void* activations, cudaStream_t stream) {
    product.result = activations;
    product.blocks =
        static_cast<int>(pieces(op.layout.intermediate, op.layout.has_gate ? kTileColumns / 2 : kTileColumns));
    EMOE_LAUNCH((tiles_kernel<W, kTransposed, false>), grid_size(made.tiles_bound * product.blocks), kTileThreads, 0,
                stream, product);
    check(cudaGetLastError(), "launching gate_up for ", op.tokens, " tokens");
    product.rows = activations;
    product.result = op.out;
    product.blocks = static_cast<int>(pieces(op.layout.hidden_out, kTileColumns));
    EMOE_LAUNCH((tiles_kernel<W, kTransposed, true>), grid_size(made.tiles_bound * product.blocks), kTileThreads, 0,
                stream, product);
    check(cudaGetLastError(), "launching down for ", op.tokens, " tokens");
}

template <class W>
void launch(const Mlp& op, const Plan& made, Product product, void* workspace, cudaStream_t stream) {
    void* activations = part<void*>(workspace, made.parts.activations);
    const bool transposed = op.layout.transposed;
    if (made.path == Path::kRows) {
        const auto run = made.vector ? (transposed ? launch_rows<W, true, true> : launch_rows<W, true, false>)
                                     : (transposed ? launch_rows<W, false, true> : launch_rows<W, false, false>);
        run(op, made, product, activations, stream);
        return;
    }
    if constexpr (sizeof(W) == 2) {
        if (made.narrow) product.rows = narrowed<W>(op, made, workspace, stream);
        (transposed ? launch_tiles<W, true> : launch_tiles<W, false>)(op, made, product, activations, stream);
    }
}

template <class W>
void launch_combine(const float* pairs, std::int64_t count, std::int64_t top_k, std::int64_t hidden_out, void* out,
                    cudaStream_t stream) {
    EMOE_LAUNCH((combine_kernel<W, false>), grid_size(std::min(pieces(count, kCombineThreads), kLoopBlocks)),
                kCombineThreads, 0, stream, pairs, count, static_cast<int>(top_k), static_cast<int>(hidden_out),
                static_cast<W*>(out));
}

}  // namespace

void route(const Mlp& op, void* workspace, cudaStream_t stream) {
    const Plan made = plan(op);
    if (op.tokens == 0) return;
    require_addresses(op, workspace);
    static_assert(sizeof(long long) == sizeof(std::int64_t));
    Picking picking{};
    picking.index = reinterpret_cast<const long long*>(op.index);
    picking.weights = op.weights;
    picking.weight_type = row_type(op.weights_dtype);
    picking.slot_of = op.slot_of;
    picking.experts = static_cast<int>(op.experts);
    picking.tokens = static_cast<int>(op.tokens);
    picking.candidates = static_cast<int>(made.candidates);
    picking.top_k = static_cast<int>(op.top_k);
    picking.keep_mass = op.keep_mass;
    picking.substituted = op.substituted;
    picking.id = part<int>(workspace, made.parts.id);
    picking.row = part<int>(workspace, made.parts.row);
    picking.weight = part<float>(workspace, made.parts.weight);
    EMOE_LAUNCH(pick_kernel, grid_size(pieces(op.tokens, kPickThreads / 32)), kPickThreads, 0, stream, picking);
    check(cudaGetLastError(), "launching the picks of ", op.tokens, " tokens");

    Sorting sorting{};
    sorting.slot_of = op.slot_of;
    sorting.experts = picking.experts;
    sorting.pairs = static_cast<int>(made.pairs);
    sorting.top_k = picking.top_k;
    sorting.tile_rows = static_cast<int>(made.tile_rows);
    sorting.id = picking.id;
    sorting.row = picking.row;
    sorting.weight = picking.weight;
    sorting.sorted = sorted_in(made, workspace);
    EMOE_LAUNCH(sort_kernel, grid_size(op.experts), kSortThreads, static_cast<std::size_t>(op.experts) * 4, stream,
                sorting);
    check(cudaGetLastError(), "launching the sort of ", made.pairs, " pairs");
}

void gather_mlp(const Mlp& op, void* workspace, cudaStream_t stream) {
    const Plan made = plan(op);
    if (op.tokens == 0) return;
    require_addresses(op, workspace);
    Product product{};
    product.shape = shape_of(op.layout);
    product.slab = reinterpret_cast<const char*>(op.slab);
    product.slot_bytes = op.slot_bytes;
    product.sorted = sorted_in(made, workspace);
    product.rows = op.hidden;
    product.row_type = row_type(op.hidden_dtype);
    if (op.layout.encoded) return launch_encoded(op, made, product, workspace, stream);
    switch (op.layout.dtype) {
        case DType::kFloat32:
            return launch<float>(op, made, product, workspace, stream);
        case DType::kFloat16:
            return launch<__half>(op, made, product, workspace, stream);
        default:  // plan() has refused every other
            return launch<__nv_bfloat16>(op, made, product, workspace, stream);
    }
}

void write_table(std::span<const std::int32_t> slot_of, std::int32_t* table, cudaStream_t stream) {
    for (std::size_t first = 0; first < slot_of.size(); first += kTableChunk) {
        TableChunk chunk;
        const std::size_t count = std::min(slot_of.size() - first, static_cast<std::size_t>(kTableChunk));
        std::copy_n(slot_of.begin() + static_cast<std::ptrdiff_t>(first), count, chunk.slot_of);
        std::fill(chunk.slot_of + count, chunk.slot_of + kTableChunk, -1);
        EMOE_LAUNCH(table_kernel, 1, kTableThreads, 0, stream, chunk, static_cast<int>(first), static_cast<int>(count),
                    table);
        check(cudaGetLastError(), "launching the slot table of ", slot_of.size(), " experts");
    }
}

void combine(const float* pairs, std::int64_t tokens, std::int64_t top_k, std::int64_t hidden_out, void* out,
             DType out_dtype, bool add, cudaStream_t stream) {
    const bool known = out_dtype == DType::kFloat32 || out_dtype == DType::kBFloat16 || out_dtype == DType::kFloat16;
    if (!known || (add && out_dtype != DType::kFloat32)) {
        throw Error(ErrorKind::kConfig, "out_dtype '" + std::string(dtype_name(out_dtype)) +
                                            "' is not one of: " + (add ? "float32" : "float32, float16, bfloat16"));
    }
    if (tokens < 0 || top_k < 1 || hidden_out < 1 || top_k > 1 << 24 || hidden_out > 1 << 24) {
        throw Error(ErrorKind::kConfig, "combine needs tokens >= 0, and top_k and hidden_out from 1 to 2^24");
    }
    if (tokens == 0) return;
    if (pairs == nullptr || out == nullptr) throw Error(ErrorKind::kConfig, "pairs or out is at address 0");
    const std::int64_t count = tokens * hidden_out;
    if (add) {
        EMOE_LAUNCH((combine_kernel<float, true>), grid_size(std::min(pieces(count, kCombineThreads), kLoopBlocks)),
                    kCombineThreads, 0, stream, pairs, count, static_cast<int>(top_k), static_cast<int>(hidden_out),
                    static_cast<float*>(out));
    } else if (out_dtype == DType::kFloat32) {
        launch_combine<float>(pairs, count, top_k, hidden_out, out, stream);
    } else if (out_dtype == DType::kFloat16) {
        launch_combine<__half>(pairs, count, top_k, hidden_out, out, stream);
    } else {
        launch_combine<__nv_bfloat16>(pairs, count, top_k, hidden_out, out, stream);
    }
    check(cudaGetLastError(), "launching combine of ", tokens, " tokens");
}

}  // namespace emoe::cuda
