// Launches of the kernels for encoded weights: frequent codes have instances of their own, AnyCodes serves the rest.
#pragma once

#include "cuda/encoded_kernels.cuh"
#include "cuda/launch.hpp"

namespace emoe::cuda {

template <class Decoder, bool kDown>
void launch_product(const Plan& made, EncodedProduct product, cudaStream_t stream) {
    const bool gated = !kDown && product.shape.has_gate;
    const std::int64_t outputs = kDown ? product.shape.hidden_out : product.shape.intermediate;
    const int columns = made.path == Path::kRows ? EncodedCut::kLocal : kTileColumns;
    product.blocks = static_cast<int>(pieces(outputs, gated ? columns / 2 : columns));
    const unsigned grid = grid_size(made.tiles_bound * product.blocks);
    if (made.path == Path::kRows) {
        EMOE_LAUNCH((encoded_rows_kernel<Decoder, kDown>), grid, kRowsThreads, 0, stream, product);
    } else if (made.rows == DType::kFloat16) {
        EMOE_LAUNCH((encoded_tiles_kernel<__half, Decoder, kDown>), grid, kTileThreads, 0, stream, product);
    } else {
        EMOE_LAUNCH((encoded_tiles_kernel<__nv_bfloat16, Decoder, kDown>), grid, kTileThreads, 0, stream, product);
    }
    check(cudaGetLastError(), "launching a product of encoded experts, ", made.pairs, " pairs");
}

template <bool kDown>
void launch_decoder(Codes codes, const Plan& made, const EncodedProduct& product, cudaStream_t stream) {
    switch (codes) {
        case Codes::kE4M3:
            return launch_product<E4M3, kDown>(made, product, stream);
        case Codes::kE2M1:
        case Codes::kE2M1Divided:
            return launch_product<E2M1, kDown>(made, product, stream);
        case Codes::kInt4:
            return launch_product<Int4, kDown>(made, product, stream);
        case Codes::kAwq:
            return launch_product<Awq, kDown>(made, product, stream);
        case Codes::kGptq:
        case Codes::kGptqV2:
            return launch_product<Gptq, kDown>(made, product, stream);
        case Codes::kQ8_0:
            return launch_product<Q8_0, kDown>(made, product, stream);
        case Codes::kQ4_K:
            return launch_product<Q4_K, kDown>(made, product, stream);
        case Codes::kQ6_K:
            return launch_product<Q6_K, kDown>(made, product, stream);
        default:
            return launch_product<AnyCodes, kDown>(made, product, stream);
    }
}

inline void launch_encoded(const Mlp& op, const Plan& made, const Product& plain, void* workspace,
                           cudaStream_t stream) {
    EncodedProduct product{};
    static_cast<Product&>(product) = plain;
    product.shape.interleaved = false;  // said by the steps of gate and up
    if (made.narrow) {
        product.rows = made.path == Path::kRows       ? narrowed<float>(op, made, workspace, stream)
                       : made.rows == DType::kFloat16 ? narrowed<__half>(op, made, workspace, stream)
                                                      : narrowed<__nv_bfloat16>(op, made, workspace, stream);
        product.row_type = row_type(made.rows);
    }
    const MlpLayout& layout = op.layout;
    product.first = matrix_for(layout.gate);
    product.second = matrix_for(layout.has_gate ? layout.up : layout.gate);
    product.result = part<void*>(workspace, made.parts.activations);
    const bool alike = !layout.has_gate || layout.gate.codes == layout.up.codes;
    launch_decoder<false>(alike ? layout.gate.codes : Codes::kFloat32, made, product, stream);
    product.rows = product.result;
    product.row_type = kRowF32;
    product.result = op.out;
    product.first = product.second = matrix_for(layout.down);
    launch_decoder<true>(layout.down.codes, made, product, stream);
}

}  // namespace emoe::cuda
