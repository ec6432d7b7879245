// The narrow path of encoded experts.
namespace emoe::cpu {
namespace {

// y[m][r] of rows [first, first + count), which are expanded a piece at a time.
inline void expanded_rows(const Source& a, int64_t first, int64_t count, int rows, const float* x, int64_t ldx,
                          float* y) {
    constexpr int64_t kPiece = 512;
    constexpr int kTogether = 4;
    static_assert(kRowsAtOnce % kTogether == 0);
    const Expand fast = expander(a.w);
    alignas(64) float piece[kRowsAtOnce][kPiece];
    alignas(64) float sums[kMostEncoded][kRowsAtOnce][L];
    for (int64_t r = 0; r < count; r += kRowsAtOnce) {
        const int64_t some = least(kRowsAtOnce, count - r);
        for (int m = 0; m < rows; ++m) {
            for (auto& sum : sums[m]) vstore(sum, vzero());
        }
        for (int64_t k = 0; k < a.w.depth; k += kPiece) {
            const int64_t n = least(kPiece, a.w.depth - k);
            fast(a, first + r, some, k, k + n, piece[0], kPiece);
            for (int64_t i = 0; i < kRowsAtOnce; ++i) {
                for (int64_t j = i < some ? n : 0; j < pad_up(n, L); ++j) piece[i][j] = 0.0F;
            }
            for (int m = 0; m < rows; ++m) {
                for (int64_t i = 0; i < some; i += kTogether) {
                    V acc[kTogether];
#pragma GCC unroll 4
                    for (int t = 0; t < kTogether; ++t) acc[t] = vload(sums[m][i + t]);
                    for (int64_t j = 0; j < n; j += L) {
                        const V with = vload(x + m * ldx + k + j);
#pragma GCC unroll 4
                        for (int t = 0; t < kTogether; ++t) acc[t] = vfma(with, vload(piece[i + t] + j), acc[t]);
                    }
#pragma GCC unroll 4
                    for (int t = 0; t < kTogether; ++t) vstore(sums[m][i + t], acc[t]);
                }
            }
        }
        for (int m = 0; m < rows; ++m) {
            for (int64_t i = 0; i < some; ++i) y[m * kNarrowBlock + r + i] = vsum(vload(sums[m][i]));
        }
    }
}

template <class W>
void plain_rows(const Source& a, int64_t first, int64_t count, int rows, const float* x, int64_t ldx, float* y) {
    using Dots = void (*)(const unsigned char*, int64_t, int64_t, const float*, int64_t, int64_t, float*, int64_t);
    static constexpr Dots kByRows[kNarrowRows] = {
        dot_rows<W, 1>, dot_rows<W, 2>, dot_rows<W, 3>, dot_rows<W, 4>,
        dot_rows<W, 5>, dot_rows<W, 6>, dot_rows<W, 7>, dot_rows<W, 8>,
    };
    const int64_t ld = a.w.depth * W::kSize;
    const unsigned char* from = a.slot + a.w.data + (a.w.first + first * a.w.step) * ld;
    for (int m = 0; m < rows; m += kNarrowRows) {
        kByRows[least(kNarrowRows, rows - m) - 1](from, ld * a.w.step, count, x + m * ldx, ldx, a.w.depth,
                                                  y + m * kNarrowBlock, kNarrowBlock);
    }
}

// y [rows][kNarrowBlock]; x as narrow_load and encoded_narrow_gate_up leave it for rows in `dtype`.
inline void encoded_product(const Source& a, [[maybe_unused]] DType dtype, int64_t first, int64_t count, int rows,
                            const uint32_t* x, float* y) {
    const auto* floats = reinterpret_cast<const float*>(x);
    const int64_t ldx = encoded_stride(a.w.depth);
    switch (a.w.codes) {
        case Codes::kFloat32:
            return plain_rows<F32>(a, first, count, rows, floats, ldx, y);
        case Codes::kBFloat16:
            return plain_rows<Bf16>(a, first, count, rows, floats, ldx, y);
        case Codes::kFloat16:
            return plain_rows<F16>(a, first, count, rows, floats, ldx, y);
        default:
#if defined(EMOE_INTEGERS)
            if (const EncodedRows fast = fast_rows(a.w, dtype)) return fast(a, first, count, rows, x, y);
#endif
            return expanded_rows(a, first, count, rows, floats, ldx, y);
    }
}

#if defined(EMOE_INTEGERS)
inline bool whole_numbers(const Weights& w, const Job& job) {
    const EncodedRows fast = fast_rows(w, job.hidden_dtype);
    return fast != nullptr && !fast_of(w).floats;
}
// Beside the floats of columns [k0, k1) of each row what the matrices that meet it want of it; the last columns, at
// `depth`, with those after them.
inline void beside_floats(const Job& job, const Weights& one, const Weights* other, uint32_t* rows, int count,
                          int64_t depth, int64_t k0, int64_t k1) {
    const int64_t g0 = k0 / kGroup;
    const int64_t g1 = (k1 == depth ? pad_up(k1, kEncodedPad) : k1) / kGroup;
    const bool whole = whole_numbers(one, job) || (other != nullptr && whole_numbers(*other, job));
    const bool turned = fast_of(one).turned || (other != nullptr && fast_of(*other).turned);
    for (int m = 0; m < count; ++m) {
        uint32_t* row = rows + m * encoded_stride(depth);
        if (whole) quantize(row, depth, g0, g1);
        if (turned) turn(row, depth, g0, g1);
    }
}
inline void encoded_narrow_load(const Job& job, const Chunk& chunk, int64_t k0, int64_t k1) {
    const MlpLayout& layout = *job.layout;
    const Weights* up = layout.has_gate ? &layout.up : nullptr;
    beside_floats(job, layout.gate, up, chunk.x, chunk.rows, layout.hidden, k0, k1);
}
#endif

void encoded_narrow_gate_up(const Job& job, const Chunk& chunk, int64_t i0, int64_t i1) {
    const MlpLayout& layout = *job.layout;
    alignas(64) float gate[kMostEncoded * kNarrowBlock + L];
    alignas(64) float up[kMostEncoded * kNarrowBlock + L];
    float gate_bias[kNarrowBlock];
    float up_bias[kNarrowBlock];
    encoded_product({layout.gate, chunk.slot}, job.hidden_dtype, i0, i1 - i0, chunk.rows, chunk.x, gate);
    if (layout.has_gate)
        encoded_product({layout.up, chunk.slot}, job.hidden_dtype, i0, i1 - i0, chunk.rows, chunk.x, up);
    for (int64_t i = i0; i < i1; ++i) {
        gate_bias[i - i0] = bias_of(layout.gate, chunk.slot, i);
        if (layout.has_gate) up_bias[i - i0] = bias_of(layout.up, chunk.slot, i);
    }
    narrow_activate(layout, chunk, i0, i1, {gate, up, 1, gate_bias, up_bias}, encoded_stride(layout.intermediate),
                    pad_up(layout.intermediate, kEncodedPad));
#if defined(EMOE_INTEGERS)
    beside_floats(job, layout.down, nullptr, chunk.h, chunk.rows, layout.intermediate, i0, i1);
#endif
}

void encoded_narrow_down(const Job& job, const Chunk& chunk, int64_t n0, int64_t n1) {
    const MlpLayout& layout = *job.layout;
    alignas(64) float y[kMostEncoded * kNarrowBlock + L];
    encoded_product({layout.down, chunk.slot}, job.hidden_dtype, n0, n1 - n0, chunk.rows, chunk.h, y);
    narrow_store(job, chunk, n0, n1, y, [&](int64_t n) { return bias_of(layout.down, chunk.slot, n); });
}

}  // namespace
}  // namespace emoe::cpu
