// The wide path: many rows of an expert. Tokens are the vector lanes: x lies transposed in panels [units][panel rows],
// each weight is broadcast, and phase one writes h directly in the form that phase two reads. A weight tile is widened
// once for all rows of the chunk. The order of additions does not depend on the number of rows.
//
// A unit is 32 bits of one token: a float, or (job.pairs) two neighbouring bf16 for vdpbf16ps.
namespace emoe::cpu {
namespace {

constexpr int64_t kDepthBlock = 256;               // units multiplied before the sums go back to memory
constexpr int64_t kTileStride = kDepthBlock + 16;  // no power of two: rows would fall into one L1 set
constexpr int64_t kTileUnits = kSubBlock * kTileStride;

inline int64_t units_of(const Job& job, int64_t depth) { return job.pairs ? (depth + 1) / 2 : depth; }
inline int64_t panel_rows(const Chunk& chunk, int64_t m) { return least(kPanel, chunk.padded - m); }

template <class X>
void wide_load(const Job& job, const Chunk& chunk, int64_t k0, int64_t k1) {
    const int64_t K = job.layout->hidden;
    const int64_t units = units_of(job, K);
    const int64_t u0 = job.pairs ? k0 / 2 : k0;
    const int64_t u1 = job.pairs ? (k1 + 1) / 2 : k1;
    for (int64_t m = 0; m < chunk.padded; ++m) {
        const int64_t width = panel_rows(chunk, m - m % kPanel);
        Bits* to = reinterpret_cast<Bits*>(chunk.x) + (m - m % kPanel) * units + m % kPanel;
        if (m >= chunk.rows) {
            for (int64_t u = u0; u < u1; ++u) to[u * width] = 0;
            continue;
        }
        const unsigned char* from = static_cast<const unsigned char*>(job.hidden) + chunk.token[m] * K * X::kSize;
        if (job.pairs) {
            for (int64_t u = u0; u < u1; ++u) {
                const uint32_t high = 2 * u + 1 < K ? half_at(from + (2 * u + 1) * X::kSize) : 0U;
                to[u * width] = half_at(from + 2 * u * X::kSize) | high << 16;
            }
        } else {
            float row[kSubBlock];
            for (int64_t k = k0; k < k1; k += kSubBlock) {
                const int64_t count = least(kSubBlock, k1 - k);
                int64_t j = 0;
                for (; j + L <= count; j += L) vstore(row + j, X::load(from + (k + j) * X::kSize));
                for (; j < count; ++j) row[j] = X::one(from + (k + j) * X::kSize);
                for (j = 0; j < count; ++j) to[(k + j) * width] = bits_of(row[j]);
            }
        }
    }
}

// Rows [first, first + count) of units [u0, u0 + n) into tile rows from `at`. Row-major: tile[row][unit];
// transposed: tile[unit][row].
template <class W>
void fill_tile(const Matrix& a, int64_t first, int64_t count, int64_t u0, int64_t n, bool pairs, float* tile,
               int64_t at) {
    auto* bits = reinterpret_cast<Bits*>(tile);
    const int64_t ld = (a.transposed ? a.rows : a.depth) * W::kSize;
    if (!a.transposed) {
        for (int64_t r = 0; r < count; ++r) {
            const unsigned char* from = a.data + (first + r) * ld + u0 * (pairs ? 4 : W::kSize);
            float* to = tile + (at + r) * kTileStride;
            // A tile row is a few lines of another page than the next one: too short a run for the hardware to foresee.
            for (int64_t b = 0; b < n * (pairs ? 4 : W::kSize); b += 64) __builtin_prefetch(from + 4 * ld + b, 0, 3);
            if (pairs) {
                const int64_t whole = least(n, (a.depth - 2 * u0) / 2);
                __builtin_memcpy(to, from, (size_t)whole * 4);
                if (whole < n) bits[(at + r) * kTileStride + whole] = half_at(from + whole * 4);
                continue;
            }
            int64_t u = 0;
            for (; u + L <= n; u += L) vstore(to + u, W::load(from + u * W::kSize));
            for (; u < n; ++u) to[u] = W::one(from + u * W::kSize);
        }
        return;
    }
    for (int64_t u = 0; u < n; ++u) {
        const unsigned char* from = a.data + (u0 + u) * (pairs ? 2 : 1) * ld + first * W::kSize;
        const int64_t to = u * kSubBlock + at;
        if (pairs) {
            if (2 * (u0 + u) + 1 < a.depth) {
                for (int64_t r = 0; r < count; ++r)
                    bits[to + r] = half_at(from + r * 2) | (uint32_t)half_at(from + ld + r * 2) << 16;
            } else {
                for (int64_t r = 0; r < count; ++r) bits[to + r] = half_at(from + r * 2);
            }
            continue;
        }
        int64_t r = 0;
        for (; r + L <= count; r += L) vstore(tile + to + r, W::load(from + r * W::kSize));
        for (; r < count; ++r) tile[to + r] = W::one(from + r * W::kSize);
    }
}

template <bool kPairs>
inline V multiply_add(V weight, V x, V acc) {
#if defined(EMOE_BF16_PAIRS)
    if constexpr (kPairs) return vdot_pairs(acc, weight, x);
#endif
    return vfma(weight, x, acc);
}

// c[r][v*L..] (+)= sum over units of tile(r, unit) * x[unit][v*L..]: R weight rows, N vectors of tokens.
template <bool kTransposed, bool kPairs, int N, int R>
void micro(const float* tile, const float* x, int64_t n, bool first, float* c, int64_t ldc) {
    constexpr int64_t kRow = kTransposed ? 1 : kTileStride;
    constexpr int64_t kUnit = kTransposed ? kSubBlock : 1;
    V acc[R][N];
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
        for (int v = 0; v < N; ++v) acc[r][v] = first ? vzero() : vload(c + r * ldc + v * L);
    }
    for (int64_t u = 0; u < n; ++u) {
        V tokens[N];
#pragma GCC unroll 4
        for (int v = 0; v < N; ++v) tokens[v] = vload(x + (u * N + v) * L);
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) {
            const V weight = vset(tile[r * kRow + u * kUnit]);
#pragma GCC unroll 4
            for (int v = 0; v < N; ++v) acc[r][v] = multiply_add<kPairs>(weight, tokens[v], acc[r][v]);
        }
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
        for (int v = 0; v < N; ++v) vstore(c + r * ldc + v * L, acc[r][v]);
    }
}

// `rows` tile rows times every panel of the chunk.
template <bool kTransposed, bool kPairs, int R>
void tile_times_panels(const float* tile, int64_t rows, const Chunk& chunk, const uint32_t* x, int64_t units,
                       int64_t u0, int64_t n, float* c) {
    if constexpr (R > 1) {
        if (rows < R) return tile_times_panels<kTransposed, kPairs, R - 1>(tile, rows, chunk, x, units, u0, n, c);
    }
    const bool first = u0 == 0;
    int64_t r = 0;
    for (; r + R <= rows; r += R) {
        const float* from = tile + r * (kTransposed ? 1 : kTileStride);
        for (int64_t m = 0; m < chunk.padded; m += kPanel) {
            const int64_t width = panel_rows(chunk, m);
            const float* panel = reinterpret_cast<const float*>(x) + m * units + u0 * width;
            float* to = c + r * chunk.padded + m;
            if (width == kPanel) {
                micro<kTransposed, kPairs, 2, R>(from, panel, n, first, to, chunk.padded);
            } else {
                micro<kTransposed, kPairs, 1, R>(from, panel, n, first, to, chunk.padded);
            }
        }
    }
    if constexpr (R > 1) {
        if (r < rows) {
            tile += r * (kTransposed ? 1 : kTileStride);
            tile_times_panels<kTransposed, kPairs, R - 1>(tile, rows - r, chunk, x, units, u0, n, c + r * chunk.padded);
        }
    }
}

// c[row][padded] of `rows` rows that fill(first unit, units, tile) expands.
template <class Fill>
void wide_product(const Job& job, const Chunk& chunk, int64_t depth, int64_t rows, bool transposed, const Fill& fill,
                  const uint32_t* x, float* c) {
    alignas(64) float tile[kTileUnits];
    const int64_t units = units_of(job, depth);
    for (int64_t u0 = 0; u0 < units; u0 += kDepthBlock) {
        const int64_t n = least(kDepthBlock, units - u0);
        fill(u0, n, tile);
#if defined(EMOE_BF16_PAIRS)
        if (job.pairs && transposed) {
            tile_times_panels<true, true, kMicroRows>(tile, rows, chunk, x, units, u0, n, c);
            continue;
        }
        if (job.pairs) {
            tile_times_panels<false, true, kMicroRows>(tile, rows, chunk, x, units, u0, n, c);
            continue;
        }
#endif
        if (transposed) {
            tile_times_panels<true, false, kMicroRows>(tile, rows, chunk, x, units, u0, n, c);
        } else {
            tile_times_panels<false, false, kMicroRows>(tile, rows, chunk, x, units, u0, n, c);
        }
    }
}

template <class W>
void wide_product(const Job& job, const Chunk& chunk, const Matrix& a, const GateRows& rows, const uint32_t* x,
                  float* c) {
    const auto fill = [&](int64_t u0, int64_t n, float* tile) {
        fill_tile<W>(a, rows.first[0], rows.count[0], u0, n, job.pairs, tile, 0);
        if (rows.count[1] > 0) fill_tile<W>(a, rows.first[1], rows.count[1], u0, n, job.pairs, tile, rows.count[0]);
    };
    wide_product(job, chunk, a.depth, rows.total(), a.transposed, fill, x, c);
}

// Columns [i0, i1) of h; column j's gate is row j * step of c, its up `up` rows further.
inline void wide_activate(const Job& job, const Chunk& chunk, int64_t i0, int64_t i1, const float* c, int64_t step,
                          int64_t up_at, const float* gate_bias, const float* up_bias) {
    const MlpLayout& layout = *job.layout;
    const int64_t units = units_of(job, layout.intermediate);
    const int64_t together = job.pairs ? 2 : 1;
    for (int64_t i = i0; i < i1; i += together) {
        for (int64_t m = 0; m < chunk.padded; m += L) {
            float h[2][L] = {};
            for (int64_t p = 0; p < together && i + p < i1; ++p) {
                const float* at = c + (i + p - i0) * step * chunk.padded + m;
                const V gate = vadd(vload(at), vset(gate_bias[i + p - i0]));
                V up = vset(1.0F);
                if (layout.has_gate) up = vadd(vload(at + up_at * chunk.padded), vset(up_bias[i + p - i0]));
                vstore(h[p], activate(layout, gate, up));
            }
            const int64_t panel = m - m % kPanel;
            Bits* to =
                reinterpret_cast<Bits*>(chunk.h) + panel * units + i / together * panel_rows(chunk, panel) + m % kPanel;
            if (job.pairs) {
                for (int l = 0; l < L; ++l) to[l] = bf16_of(h[0][l]) | bf16_of(h[1][l]) << 16;
            } else {
                for (int l = 0; l < L; ++l) to[l] = bits_of(h[0][l]);
            }
        }
    }
}

inline void wide_store(const Job& job, const Chunk& chunk, int64_t n0, int64_t n1, const float* c, const float* bias) {
    for (int m = 0; m < chunk.rows; ++m) {
        float* out = job.out + chunk.out_row[m] * job.layout->hidden_out + n0;
        for (int64_t n = 0; n < n1 - n0; ++n) {
            const float value = chunk.weight[m] * (c[n * chunk.padded + m] + bias[n]);
            out[n] = job.accumulate ? out[n] + value : value;
        }
    }
}

template <class W>
void wide_gate_up(const Job& job, const Chunk& chunk, int64_t i0, int64_t i1) {
    const MlpLayout& layout = *job.layout;
    const Matrix a = gate_up_of(layout, chunk.slot);
    const GateRows rows = gate_rows(layout, i0, i1);
    alignas(64) float c[kSubBlock * kWideRows];
    wide_product<W>(job, chunk, a, rows, chunk.x, c);
    float gate_bias[kSubBlock];
    float up_bias[kSubBlock];
    for (int64_t i = i0; i < i1; ++i) {
        gate_bias[i - i0] = bias_at<W>(a, gate_row(layout, i));
        if (layout.has_gate) up_bias[i - i0] = bias_at<W>(a, up_row(layout, i));
    }
    wide_activate(job, chunk, i0, i1, c, rows.step, rows.up, gate_bias, up_bias);
}

template <class W>
void wide_down(const Job& job, const Chunk& chunk, int64_t n0, int64_t n1) {
    const MlpLayout& layout = *job.layout;
    const Matrix a = down_of(layout, chunk.slot);
    alignas(64) float c[kSubBlock * kWideRows];
    wide_product<W>(job, chunk, a, {{n0, 0}, {n1 - n0, 0}, 1, 0}, chunk.h, c);

    float bias[kSubBlock];
    for (int64_t n = n0; n < n1; ++n) bias[n - n0] = bias_at<W>(a, n);
    wide_store(job, chunk, n0, n1, c, bias);
}

}  // namespace
}  // namespace emoe::cpu
