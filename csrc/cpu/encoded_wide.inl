// The wide path of encoded experts: tiles of weights are expanded once for all rows of the chunk, then multiplied as
// plain ones are.
namespace emoe::cpu {
namespace {

inline void pairs_of(const float* from, int64_t n, Bits* to) {
    int64_t u = 0;
#if defined(EMOE_BF16_PAIRS)
    for (; u + L <= n; u += L) store_pairs(vload(from + 2 * u), vload(from + 2 * u + L), to + u);
#endif
    for (; u < n; ++u) to[u] = bf16_of(from[2 * u]) | bf16_of(from[2 * u + 1]) << 16;
}

// Rows [first, first + count) of units [u0, u0 + n) into tile rows from `at`.
inline void expand_tile(const Source& a, int64_t first, int64_t count, int64_t u0, int64_t n, bool pairs, float* tile,
                        int64_t at) {
    const Expand fast = expander(a.w);
    for (int64_t r = 0; r < count; r += kRowsAtOnce) {
        const int64_t some = least(kRowsAtOnce, count - r);
        float* to = tile + (at + r) * kTileStride;
        if (!pairs) {
            fast(a, first + r, some, u0, u0 + n, to, kTileStride);
            continue;
        }
        alignas(64) float rows[kRowsAtOnce][2 * kDepthBlock];
        const int64_t have = least(2 * n, a.w.depth - 2 * u0);
        fast(a, first + r, some, 2 * u0, 2 * u0 + have, rows[0], 2 * kDepthBlock);
        for (int64_t i = 0; i < some; ++i) {
            if (have < 2 * n) rows[i][have] = 0.0F;
            pairs_of(rows[i], n, reinterpret_cast<Bits*>(to + i * kTileStride));
        }
    }
}

void encoded_wide_gate_up(const Job& job, const Chunk& chunk, int64_t i0, int64_t i1) {
    const MlpLayout& layout = *job.layout;
    const int64_t n = i1 - i0;
    alignas(64) float c[kSubBlock * kWideRows];
    const auto fill = [&](int64_t u0, int64_t units, float* tile) {
        expand_tile({layout.gate, chunk.slot}, i0, n, u0, units, job.pairs, tile, 0);
        if (layout.has_gate) expand_tile({layout.up, chunk.slot}, i0, n, u0, units, job.pairs, tile, n);
    };
    wide_product(job, chunk, layout.hidden, layout.has_gate ? 2 * n : n, false, fill, chunk.x, c);
    float gate_bias[kSubBlock];
    float up_bias[kSubBlock];
    for (int64_t i = i0; i < i1; ++i) {
        gate_bias[i - i0] = bias_of(layout.gate, chunk.slot, i);
        if (layout.has_gate) up_bias[i - i0] = bias_of(layout.up, chunk.slot, i);
    }
    wide_activate(job, chunk, i0, i1, c, 1, n, gate_bias, up_bias);
}

void encoded_wide_down(const Job& job, const Chunk& chunk, int64_t n0, int64_t n1) {
    const MlpLayout& layout = *job.layout;
    alignas(64) float c[kSubBlock * kWideRows];
    const auto fill = [&](int64_t u0, int64_t units, float* tile) {
        expand_tile({layout.down, chunk.slot}, n0, n1 - n0, u0, units, job.pairs, tile, 0);
    };
    wide_product(job, chunk, layout.intermediate, n1 - n0, false, fill, chunk.h, c);
    float bias[kSubBlock];
    for (int64_t n = n0; n < n1; ++n) bias[n - n0] = bias_of(layout.down, chunk.slot, n);
    wide_store(job, chunk, n0, n1, c, bias);
}

}  // namespace
}  // namespace emoe::cpu
