// The wide path of encoded experts: tiles of weights are expanded once for all rows of the chunk, then multiplied as
// plain ones are.
namespace emoe::cpu {
namespace {

// Rows [first, first + count) of units [u0, u0 + n) into tile rows from `at`.
inline void expand_tile(const Source& a, int64_t first, int64_t count, int64_t u0, int64_t n, bool pairs, float* tile,
                        int64_t at) {
    for (int64_t r = 0; r < count; ++r) {
        float* to = tile + (at + r) * kTileStride;
        if (!pairs) {
            expand(a.w, a.slot, first + r, u0, u0 + n, to);
            continue;
        }
        alignas(64) float row[2 * kDepthBlock];
        const int64_t have = least(2 * n, a.w.depth - 2 * u0);
        expand(a.w, a.slot, first + r, 2 * u0, 2 * u0 + have, row);
        if (have < 2 * n) row[have] = 0.0F;
        auto* bits = reinterpret_cast<Bits*>(to);
        for (int64_t u = 0; u < n; ++u) bits[u] = bf16_of(row[2 * u]) | bf16_of(row[2 * u + 1]) << 16;
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
