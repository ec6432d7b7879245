// What launches share: grids, parts of the workspace, encoded matrices, the conversion of hidden states. For .cu files.
#pragma once

#include <algorithm>
#include <string>

#include "core/error.hpp"
#include "core/weights.hpp"
#include "cuda/decode.cuh"
#include "cuda/kernels.hpp"
#include "cuda/plan.hpp"
#include "cuda/runtime.hpp"
#include "cuda/tiles_kernel.cuh"

namespace emoe::cuda {

constexpr std::int64_t kLoopBlocks = 4096;  // of kernels that loop over their elements

inline int row_type(DType dtype) {
    return dtype == DType::kFloat32 ? kRowF32 : dtype == DType::kFloat16 ? kRowF16 : kRowBF16;
}

inline std::int64_t pieces(std::int64_t n, std::int64_t unit) { return (n + unit - 1) / unit; }

inline unsigned grid_size(std::int64_t blocks) {
    if (blocks < (1LL << 31)) return static_cast<unsigned>(blocks);
    throw Error(ErrorKind::kConfig, "a call of " + std::to_string(blocks) + " blocks; a grid has at most 2^31 - 1");
}

template <class T>
T* part(void* workspace, std::size_t offset) {
    return reinterpret_cast<T*>(static_cast<std::byte*>(workspace) + offset);
}

inline Matrix matrix_for(const Weights& w) {
    Matrix m{};
    m.codes = static_cast<int>(w.codes);
    m.scale = static_cast<int>(w.scale);
    m.rows = static_cast<int>(w.rows);
    m.depth = static_cast<int>(w.depth);
    m.first = static_cast<int>(w.first);
    m.step = static_cast<int>(w.step);
    m.scale_rows = static_cast<int>(w.scale_rows);
    m.scale_cols = static_cast<int>(w.scale_cols);
    m.scale_shift = -1;
    for (int shift = 0; shift < 25; ++shift) {
        if (w.scale_cols == std::int64_t{1} << shift) m.scale_shift = shift;
    }
    m.groups = w.scale_cols == 0 ? 1 : static_cast<int>(pieces(w.depth, w.scale_cols));
    m.bias_step = static_cast<int>(w.bias_step);
    m.bias_type = row_type(w.bias_dtype);
    m.data = w.data;
    m.scales = w.scales;
    m.zeros = w.zeros;
    m.factor = w.factor;
    m.bias = w.bias;
    return m;
}

// Hidden states in type W, aligned, in the workspace.
template <class W>
const void* narrowed(const Mlp& op, const Plan& made, void* workspace, cudaStream_t stream) {
    W* hidden = part<W>(workspace, made.parts.hidden);
    const std::int64_t count = op.tokens * op.layout.hidden;
    EMOE_LAUNCH((narrow_kernel<W>), grid_size(std::min(pieces(count, 256), kLoopBlocks)), 256, 0, stream, op.hidden,
                row_type(op.hidden_dtype), count, hidden);
    check(cudaGetLastError(), "launching the conversion of ", op.tokens, " tokens");
    return hidden;
}

}  // namespace emoe::cuda
