// A linear layer: the rows of a chunk times `gate` of its layout, rounded once and written out.
namespace emoe::cpu {
namespace {

inline float float_at(const void* data, DType dtype, int64_t i) {
    const auto* bytes = static_cast<const unsigned char*>(data);
    if (dtype == DType::kFloat32) return F32::one(bytes + i * 4);
    return dtype == DType::kBFloat16 ? Bf16::one(bytes + i * 2) : F16::one(bytes + i * 2);
}

// Row m of column n is sums[m * row + (n - n0) * column].
inline void linear_store(const Job& job, const Chunk& chunk, const LinearOut& out, int64_t n0, int64_t n1,
                         const float* sums, int64_t row, int64_t column) {
    float bias[kNarrowBlock];
    for (int64_t n = n0; n < n1; ++n) bias[n - n0] = out.bias ? float_at(out.bias, out.bias_dtype, n) : 0.0F;
    for (int m = 0; m < chunk.rows; ++m) {
        const int64_t at = chunk.out_row[m] * job.layout->gate.count;
        for (int64_t n = n0; n < n1; ++n) {
            const float value = sums[m * row + (n - n0) * column] + bias[n - n0];
            if (job.hidden_dtype == DType::kFloat32) {
                __builtin_memcpy(static_cast<unsigned char*>(out.y) + (at + n) * 4, &value, 4);
            } else {
                const auto half = (uint16_t)(job.hidden_dtype == DType::kBFloat16 ? bf16_of(value) : f16_of(value));
                __builtin_memcpy(static_cast<unsigned char*>(out.y) + (at + n) * 2, &half, 2);
            }
        }
    }
}

// Plain weights in one piece go into a tile as those of plain experts do.
inline void linear_tile(const Source& a, int64_t n0, int64_t n1, int64_t u0, int64_t units, bool pairs, float* tile) {
    const bool whole = a.w.first == 0 && a.w.step == 1;
    const Matrix matrix{a.slot + a.w.data, nullptr, a.w.rows, a.w.depth, false};
    if (whole && a.w.codes == Codes::kBFloat16) return fill_tile<Bf16>(matrix, n0, n1 - n0, u0, units, pairs, tile, 0);
    if (whole && !pairs && a.w.codes == Codes::kFloat32) {
        return fill_tile<F32>(matrix, n0, n1 - n0, u0, units, false, tile, 0);
    }
    if (whole && !pairs && a.w.codes == Codes::kFloat16) {
        return fill_tile<F16>(matrix, n0, n1 - n0, u0, units, false, tile, 0);
    }
    expand_tile(a, n0, n1 - n0, u0, units, pairs, tile, 0);
}

void linear(const Job& job, const Chunk& chunk, const LinearOut& out, int64_t n0, int64_t n1) {
    const Source a{job.layout->gate, chunk.slot};
    if (!chunk.wide) {
        alignas(64) float y[kNarrowRows * kNarrowBlock + L];
        encoded_product(a, job.hidden_dtype, n0, n1 - n0, chunk.rows, chunk.x, y);
        return linear_store(job, chunk, out, n0, n1, y, kNarrowBlock, 1);
    }
    alignas(64) float c[kSubBlock * kWideRows];
    const auto fill = [&](int64_t u0, int64_t units, float* tile) {
        linear_tile(a, n0, n1, u0, units, job.pairs, tile);
    };
    wide_product(job, chunk, a.w.depth, n1 - n0, false, fill, chunk.x, c);
    linear_store(job, chunk, out, n0, n1, c, 1, chunk.padded);
}

}  // namespace
}  // namespace emoe::cpu
