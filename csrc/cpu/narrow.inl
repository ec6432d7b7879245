// The narrow path: up to kNarrowRows rows of an expert, each weight read once and used for all of them.
// The order of additions of one (row, output) does not depend on how many rows there are.
namespace emoe::cpu {
namespace {

template <class X>
void narrow_load(const Job& job, const Chunk& chunk, int64_t k0, int64_t k1) {
    const int64_t K = job.layout->hidden;
    const int64_t end = pad_up(K, job.layout->encoded ? kEncodedPad : kRowPad);
    const int64_t stride = job.layout->encoded ? encoded_stride(K) : end;
    for (int m = 0; m < chunk.rows; ++m) {
        const unsigned char* from = static_cast<const unsigned char*>(job.hidden) + chunk.token[m] * K * X::kSize;
        float* to = reinterpret_cast<float*>(chunk.x) + m * stride;
        int64_t k = k0;
        for (; k + L <= k1; k += L) vstore(to + k, X::load(from + k * X::kSize));
        for (; k < k1; ++k) to[k] = X::one(from + k * X::kSize);
        if (k1 == K) {
            for (; k < end; ++k) to[k] = 0.0F;
        }
    }
}

// Rows are fetched whole tiles before they are needed, and so many that memory has the time to answer: four rows of
// 576 bytes ahead were too few (docs/kernels.md).
constexpr int64_t kAhead = 6 << 10;
inline int64_t ahead_of(int64_t tile) { return tile == 0 ? 0 : pad_up(kAhead, tile); }

// y[m][r] = x[m] . w[r] for R weight rows. `ld` in bytes; x is zero-padded to kRowPad.
template <class W, int M, int R>
inline void dot_tile(const unsigned char* w, int64_t ld, const float* x, int64_t ldx, int64_t K, float* y,
                     int64_t ldy) {
    constexpr int64_t kLine = 64 / W::kSize;
    constexpr int64_t kStep = kLine > L ? kLine : L;
    const int64_t ahead_by = ahead_of(R * ld);
    V acc[M][R];
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) acc[m][r] = vzero();
    }
    const auto step = [&](int64_t k, const V(&wide)[R]) __attribute__((always_inline)) {
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m) {
            const V row = vload(x + m * ldx + k);
#pragma GCC unroll 8
            for (int r = 0; r < R; ++r) acc[m][r] = vfma(row, wide[r], acc[m][r]);
        }
    };
    int64_t k = 0;
    for (; k + kStep <= K; k += kStep) {
        // Into L2 only: R rows at a stride of a page share L1 sets, and lines fetched early would evict those in use
        // (53 -> 97 % of the read bandwidth at K=2048 bf16, R=4).
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) __builtin_prefetch(w + r * ld + ahead_by + k * W::kSize, 0, 2);
#pragma GCC unroll 4
        for (int64_t part = 0; part < kStep; part += L) {
            V wide[R];
#pragma GCC unroll 8
            for (int r = 0; r < R; ++r) wide[r] = W::load(w + r * ld + (k + part) * W::kSize);
            step(k + part, wide);
        }
    }
    for (; k + L <= K; k += L) {
        V wide[R];
        for (int r = 0; r < R; ++r) wide[r] = W::load(w + r * ld + k * W::kSize);
        step(k, wide);
    }
    if (k < K) {
        V wide[R];
        for (int r = 0; r < R; ++r) wide[r] = load_tail<W>(w + r * ld + k * W::kSize, K - k);
        step(k, wide);
    }
    for (int m = 0; m < M; ++m) {
        for (int r = 0; r < R; ++r) y[m * ldy + r] = vsum(acc[m][r]);
    }
}

template <class W, int M>
void dot_rows(const unsigned char* w, int64_t ld, int64_t rows, const float* x, int64_t ldx, int64_t K, float* y,
              int64_t ldy) {
    // As many weight rows at once as registers hold: each row of x is then loaded once for R of them.
    constexpr int R = kManyRegisters ? (M <= 6 ? 4 : 3) : (M <= 2 ? 4 : M <= 4 ? 3 : M <= 6 ? 2 : 3);
    int64_t r = 0;
    for (; r + R <= rows; r += R) {
        if constexpr (kManyRegisters || M <= 6) {
            dot_tile<W, M, R>(w + r * ld, ld, x, ldx, K, y + r, ldy);
        } else {  // sums that spill cost more than weights read again from L1 (18 -> 12 ms for 8 rows with AVX2)
            dot_tile<W, 4, R>(w + r * ld, ld, x, ldx, K, y + r, ldy);
            dot_tile<W, M - 4, R>(w + r * ld, ld, x + 4 * ldx, ldx, K, y + 4 * ldy + r, ldy);
        }
    }
    for (; r < rows; ++r) dot_tile<W, M, 1>(w + r * ld, ld, x, ldx, K, y + r, ldy);
}

// y[m][c] = sum over k of x[m][k] * w[k][c], the transposed layout: the sums stay in L1, four weight rows stream at
// once.
template <class W, int M>
void axpy_columns(const unsigned char* w, int64_t ld, int64_t columns, const float* x, int64_t ldx, int64_t K, float* y,
                  int64_t ldy) {
    constexpr int64_t kRowsAhead = 8;
    for (int m = 0; m < M; ++m) {
        for (int64_t c = 0; c < columns; c += L) vstore(y + m * ldy + c, vzero());
    }
    int64_t k = 0;
    for (; k + 4 <= K; k += 4) {
        const unsigned char* at = w + k * ld;
        for (int64_t c = 0; c < columns; c += L) {
            V wide[4];
            if (c + L <= columns) {
                if (c * W::kSize % 64 == 0) {
#pragma GCC unroll 4
                    for (int j = 0; j < 4; ++j) __builtin_prefetch(at + (kRowsAhead + j) * ld + c * W::kSize, 0, 3);
                }
#pragma GCC unroll 4
                for (int j = 0; j < 4; ++j) wide[j] = W::load(at + j * ld + c * W::kSize);
            } else {
                for (int j = 0; j < 4; ++j) wide[j] = load_tail<W>(at + j * ld + c * W::kSize, columns - c);
            }
#pragma GCC unroll 8
            for (int m = 0; m < M; ++m) {
                V sum = vload(y + m * ldy + c);
#pragma GCC unroll 4
                for (int j = 0; j < 4; ++j) sum = vfma(vset(x[m * ldx + k + j]), wide[j], sum);
                vstore(y + m * ldy + c, sum);
            }
        }
    }
    for (; k < K; ++k) {
        for (int64_t c = 0; c < columns; c += L) {
            const unsigned char* at = w + k * ld + c * W::kSize;
            const V wide = c + L <= columns ? W::load(at) : load_tail<W>(at, columns - c);
            for (int m = 0; m < M; ++m) {
                float* sum = y + m * ldy + c;
                vstore(sum, vfma(vset(x[m * ldx + k]), wide, vload(sum)));
            }
        }
    }
}

// y [M][kNarrowBlock] for matrix rows [first, first + count).
template <class W, int M>
void narrow_product(const Matrix& a, int64_t first, int64_t count, const float* x, float* y) {
    const int64_t ldx = pad_up(a.depth, kRowPad);
    if (a.transposed) {
        const int64_t ld = a.rows * W::kSize;
        axpy_columns<W, M>(a.data + first * W::kSize, ld, count, x, ldx, a.depth, y, kNarrowBlock);
    } else {
        const int64_t ld = a.depth * W::kSize;
        dot_rows<W, M>(a.data + first * ld, ld, count, x, ldx, a.depth, y, kNarrowBlock);
    }
}
template <class W>
void narrow_product(int rows, const Matrix& a, int64_t first, int64_t count, const float* x, float* y) {
    using Product = void (*)(const Matrix&, int64_t, int64_t, const float*, float*);
    static constexpr Product kByRows[kNarrowRows] = {
        narrow_product<W, 1>, narrow_product<W, 2>, narrow_product<W, 3>, narrow_product<W, 4>,
        narrow_product<W, 5>, narrow_product<W, 6>, narrow_product<W, 7>, narrow_product<W, 8>,
    };
    kByRows[rows - 1](a, first, count, x, y);
}

// What gate and up gave for some columns: column j of a row at j * step.
struct GateSums {
    const float* gate;
    const float* up;
    int64_t step;
    const float* gate_bias;
    const float* up_bias;
};

// Columns [i0, i1) of h; the last block also fills up to `end` with zeros.
inline void narrow_activate(const MlpLayout& layout, const Chunk& chunk, int64_t i0, int64_t i1, const GateSums& sums,
                            int64_t stride, int64_t end) {
    for (int m = 0; m < chunk.rows; ++m) {
        float* h = reinterpret_cast<float*>(chunk.h) + m * stride;
        for (int64_t j = 0; j < i1 - i0; j += L) {
            const int64_t count = least(L, i1 - i0 - j);
            float g[L] = {};
            float u[L] = {};
            for (int64_t l = 0; l < count; ++l) {
                const int64_t at = m * kNarrowBlock + (j + l) * sums.step;
                g[l] = sums.gate[at] + sums.gate_bias[j + l];
                u[l] = layout.has_gate ? sums.up[at] + sums.up_bias[j + l] : 1.0F;
            }
            vstore(g, activate(layout, vload(g), vload(u)));
            for (int64_t l = 0; l < count; ++l) h[i0 + j + l] = g[l];
        }
        if (i1 == layout.intermediate) {
            for (int64_t i = i1; i < end; ++i) h[i] = 0.0F;
        }
    }
}

template <class Bias>
inline void narrow_store(const Job& job, const Chunk& chunk, int64_t n0, int64_t n1, const float* y, const Bias& bias) {
    for (int m = 0; m < chunk.rows; ++m) {
        float* out = job.out + chunk.out_row[m] * job.layout->hidden_out;
        for (int64_t n = n0; n < n1; ++n) {
            const float value = chunk.weight[m] * (y[m * kNarrowBlock + n - n0] + bias(n));
            out[n] = job.accumulate ? out[n] + value : value;
        }
    }
}

template <class W>
void narrow_gate_up(const Job& job, const Chunk& chunk, int64_t i0, int64_t i1) {
    const MlpLayout& layout = *job.layout;
    const Matrix a = gate_up_of(layout, chunk.slot);
    const GateRows rows = gate_rows(layout, i0, i1);
    const int64_t stride = pad_up(layout.intermediate, kRowPad);
    alignas(64) float gate[kNarrowRows * kNarrowBlock + L];
    alignas(64) float up[kNarrowRows * kNarrowBlock + L];
    const auto* x = reinterpret_cast<const float*>(chunk.x);
    narrow_product<W>(chunk.rows, a, rows.first[0], rows.count[0], x, gate);
    if (rows.count[1] > 0) narrow_product<W>(chunk.rows, a, rows.first[1], rows.count[1], x, up);

    float gate_bias[kNarrowBlock];
    float up_bias[kNarrowBlock];
    for (int64_t i = i0; i < i1; ++i) {
        gate_bias[i - i0] = bias_at<W>(a, gate_row(layout, i));
        if (layout.has_gate) up_bias[i - i0] = bias_at<W>(a, up_row(layout, i));
    }
    const float* ups = rows.count[1] > 0 ? up : gate + rows.up;
    narrow_activate(layout, chunk, i0, i1, {gate, ups, rows.step, gate_bias, up_bias}, stride, stride);
}

template <class W>
void narrow_down(const Job& job, const Chunk& chunk, int64_t n0, int64_t n1) {
    const MlpLayout& layout = *job.layout;
    const Matrix a = down_of(layout, chunk.slot);
    alignas(64) float y[kNarrowRows * kNarrowBlock + L];
    narrow_product<W>(chunk.rows, a, n0, n1 - n0, reinterpret_cast<const float*>(chunk.h), y);
    narrow_store(job, chunk, n0, n1, y, [&](int64_t n) { return bias_at<W>(a, n); });
}

}  // namespace
}  // namespace emoe::cpu
