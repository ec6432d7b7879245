// Attention of one row, and RMSNorm. Keys are taken kAttentionKeys at a time; what these parts give is joined in order.
namespace emoe::cpu {
namespace {

// n floats as elements of the dtype, rounded to nearest even.
inline void store_row(DType dtype, const float* from, int64_t n, unsigned char* to) {
    if (dtype == DType::kFloat32) {
        __builtin_memcpy(to, from, (size_t)n * 4);
        return;
    }
    for (int64_t i = 0; i < n; ++i) {
        const auto half = (uint16_t)(dtype == DType::kBFloat16 ? bf16_of(from[i]) : f16_of(from[i]));
        __builtin_memcpy(to + i * 2, &half, 2);
    }
}

template <class W>
inline V load_some(const unsigned char* p, int64_t at, int64_t n) {
    return n - at >= L ? W::load(p + at * W::kSize) : load_tail<W>(p + at * W::kSize, n - at);
}

// n elements as floats, then zeros up to a multiple of L.
template <class W>
inline void widen(const unsigned char* from, int64_t n, float* to) {
    for (int64_t i = 0; i < n; i += L) vstore(to + i, load_some<W>(from, i, n));
}

template <class W>
void attend_load_as(const AttentionWork& work, int64_t set) {
    const Attention& op = *work.op;
    const int64_t group = op.heads / op.kv_heads;
    for (int64_t g = 0; g < group; ++g) {
        const int64_t head = set * group + g;  // of all sequences
        const int64_t at = head / op.heads * op.query_strides.batch + head % op.heads * op.query_strides.head;
        float* to = work.queries + head * work.query_stride;
        for (int64_t i = 0; i < work.query_stride; i += L) vstore(to + i, vzero());
        widen<W>(static_cast<const unsigned char*>(op.query) + at * W::kSize, op.depth, to);
        for (int64_t i = 0; i < op.depth; i += L) vstore(to + i, vmul(vload(to + i), vset(op.scale)));
    }
}

constexpr int kRows = 4;  // keys or values at a time

// Products of a query with `count` keys.
template <class W>
inline void key_products(const float* query, const unsigned char* const* keys, int count, int64_t depth, float* out) {
    V sum[kRows];
    for (V& each : sum) each = vzero();
    int64_t d = 0;
    for (; d + L <= depth; d += L) {
        const V q = vload(query + d);
        for (int r = 0; r < kRows; ++r) sum[r] = vfma(q, W::load(keys[r] + d * W::kSize), sum[r]);
    }
    if (d < depth) {
        const V q = vload(query + d);
        for (int r = 0; r < kRows; ++r) sum[r] = vfma(q, load_tail<W>(keys[r] + d * W::kSize, depth - d), sum[r]);
    }
    for (int r = 0; r < count; ++r) out[r] = vsum(sum[r]);
}

// Adds values, weighted, to sums of a multiple of L.
template <class W>
inline void add_values(const float* weights, const unsigned char* const* values, int64_t depth, float* sums) {
    V w[kRows];
    for (int r = 0; r < kRows; ++r) w[r] = vset(weights[r]);
    for (int64_t d = 0; d < depth; d += L) {
        V sum = vload(sums + d);
        for (int r = 0; r < kRows; ++r) sum = vfma(w[r], load_some<W>(values[r], d, depth), sum);
        vstore(sums + d, sum);
    }
}

// Addresses of `count` rows; the others are the last, whose products are not used.
inline void rows_at(const unsigned char* first, int64_t stride, int64_t row, int count, const unsigned char** rows) {
    for (int r = 0; r < kRows; ++r) rows[r] = first + (row + (r < count ? r : count - 1)) * stride;
}

// `rows` as floats in `wide`, and their new addresses.
template <class W>
inline void widen_rows(const unsigned char** rows, int64_t depth, float* wide) {
    for (int r = 0; r < kRows; ++r) {
        widen<W>(rows[r], depth, wide + r * kMostHeadDepth);
        rows[r] = reinterpret_cast<const unsigned char*>(wide + r * kMostHeadDepth);
    }
}

// exp(score - most) of `count` scores, zero where the score is minus infinity and behind the end; returns their sum.
inline float weigh(float* scores, int64_t count, float most) {
    V sum = vzero();
    for (int64_t i = count; i < pad_up(count, L); ++i) scores[i] = -INFINITY;
    for (int64_t i = 0; i < count; i += L) {
        float kept[L];
        vstore(kept, vload(scores + i));
        vstore(scores + i, vexp(vsub(vload(scores + i), vset(most))));
        for (int l = 0; l < L; ++l) {
            if (kept[l] == -INFINITY) scores[i + l] = 0.0F;
        }
        sum = vadd(sum, vload(scores + i));
    }
    return vsum(sum);
}

template <class W>
void attend_as(const AttentionWork& work, int64_t set, int64_t part) {
    const Attention& op = *work.op;
    const int64_t group = op.heads / op.kv_heads, sequence = set / op.kv_heads, kv_head = set % op.kv_heads;
    const int64_t first = part * kAttentionKeys, count = least(kAttentionKeys, op.keys - first);
    const int64_t task = (set * work.parts + part) * group;
    const auto* keys = static_cast<const unsigned char*>(op.key) +
                       (sequence * op.key_strides.batch + kv_head * op.key_strides.head) * W::kSize;
    const auto* values = static_cast<const unsigned char*>(op.value) +
                         (sequence * op.value_strides.batch + kv_head * op.value_strides.head) * W::kSize;
    float* scores = work.scores + task * kAttentionKeys;
    float* sums = work.sums + task * work.sum_stride;
    const unsigned char* rows[kRows];
    alignas(64) float wide[kRows * kMostHeadDepth];
    for (int64_t s = 0; s < count; s += kRows) {
        const int some = (int)least(kRows, count - s);
        rows_at(keys, op.key_strides.row * W::kSize, first + s, some, rows);
        if (group > 1) widen_rows<W>(rows, op.depth, wide);
        for (int64_t g = 0; g < group; ++g) {
            const float* query = work.queries + (set * group + g) * work.query_stride;
            float* to = scores + g * kAttentionKeys + s;
            group > 1 ? key_products<F32>(query, rows, some, op.depth, to)
                      : key_products<W>(query, rows, some, op.depth, to);
        }
    }
    for (int64_t g = 0; g < group; ++g) {
        float* own = scores + g * kAttentionKeys;
        if (op.mask != nullptr) {
            const unsigned char* mask = op.mask + sequence * op.mask_strides.batch +
                                        (kv_head * group + g) * op.mask_strides.head + first * op.mask_strides.row;
            for (int64_t s = 0; s < count; ++s) {
                if (mask[s * op.mask_strides.row] == 0) own[s] = -INFINITY;
            }
        }
        float most = -INFINITY;
        for (int64_t s = 0; s < count; ++s) most = own[s] > most ? own[s] : most;
        float* to = sums + g * work.sum_stride;
        to[0] = most;
        // A score that is NaN is no maximum; its weight is NaN, as it should be.
        to[1] = weigh(own, count, most == -INFINITY ? 0.0F : most);
        for (int64_t d = 2; d < work.sum_stride; d += L) vstore(to + d, vzero());
    }
    for (int64_t s = 0; s < count; s += kRows) {
        const int some = (int)least(kRows, count - s);
        rows_at(values, op.value_strides.row * W::kSize, first + s, some, rows);
        if (group > 1) widen_rows<W>(rows, op.value_depth, wide);
        for (int64_t g = 0; g < group; ++g) {
            const float* weights = scores + g * kAttentionKeys + s;  // zero behind the end
            float* to = sums + g * work.sum_stride + 2;
            group > 1 ? add_values<F32>(weights, rows, op.value_depth, to)
                      : add_values<W>(weights, rows, op.value_depth, to);
        }
    }
}

void attend_load(const AttentionWork& work, int64_t set) {
    switch (work.op->dtype) {
        case DType::kFloat32:
            return attend_load_as<F32>(work, set);
        case DType::kBFloat16:
            return attend_load_as<Bf16>(work, set);
        default:
            return attend_load_as<F16>(work, set);
    }
}

void attend(const AttentionWork& work, int64_t set, int64_t part) {
    switch (work.op->dtype) {
        case DType::kFloat32:
            return attend_as<F32>(work, set, part);
        case DType::kBFloat16:
            return attend_as<Bf16>(work, set, part);
        default:
            return attend_as<F16>(work, set, part);
    }
}

inline float one_exp(float x) {
    float lanes[L];
    vstore(lanes, vexp(vset(x)));
    return lanes[0];
}

void attend_store(const AttentionWork& work, int64_t set) {
    const Attention& op = *work.op;
    const int64_t group = op.heads / op.kv_heads;
    const int64_t size = op.dtype == DType::kFloat32 ? 4 : 2;
    for (int64_t g = 0; g < group; ++g) {
        const auto sums = [&](int64_t part) {
            return work.sums + ((set * work.parts + part) * group + g) * work.sum_stride;
        };
        float most = -INFINITY;
        for (int64_t part = 0; part < work.parts; ++part) most = sums(part)[0] > most ? sums(part)[0] : most;
        alignas(64) float out[kMostHeadDepth];
        for (int64_t d = 0; d < op.value_depth; d += L) vstore(out + d, vzero());
        float total = 0.0F;
        for (int64_t part = 0; part < work.parts; ++part) {
            const float* from = sums(part);
            const float weight = from[0] == -INFINITY && from[1] == 0.0F ? 0.0F : one_exp(from[0] - most);
            total += weight * from[1];
            for (int64_t d = 0; d < op.value_depth; d += L) {
                vstore(out + d, vfma(vset(weight), vload(from + 2 + d), vload(out + d)));
            }
        }
        const float scale = total == 0.0F ? 0.0F : 1.0F / total;  // a row that sees nothing gives zeros
        for (int64_t d = 0; d < op.value_depth; d += L) vstore(out + d, vmul(vload(out + d), vset(scale)));
        store_row(op.dtype, out, op.value_depth,
                  static_cast<unsigned char*>(op.out) + (set * group + g) * op.value_depth * size);
    }
}

template <class W>
void rms_norm_as(const RmsNorm& op, int64_t row) {
    const auto* x = static_cast<const unsigned char*>(op.x) + row * op.width * W::kSize;
    const auto* weight = static_cast<const unsigned char*>(op.weight);
    auto* out = static_cast<unsigned char*>(op.out) + row * op.width * W::kSize;
    V sum[2] = {vzero(), vzero()};
    for (int64_t i = 0; i < op.width; i += 2 * L) {
        const V a = load_some<W>(x, i, op.width);
        sum[0] = vfma(a, a, sum[0]);
        if (i + L < op.width) {
            const V b = load_some<W>(x, i + L, op.width);
            sum[1] = vfma(b, b, sum[1]);
        }
    }
    const float mean = vsum(vadd(sum[0], sum[1])) / (float)op.width;
    const V scale = vset(1.0F / __builtin_sqrtf(mean + op.epsilon));
    for (int64_t i = 0; i < op.width; i += L) {
        const int64_t count = least(L, op.width - i);
        float scaled[L];
        unsigned char rounded[L * 4] = {};
        vstore(scaled, vmul(load_some<W>(x, i, op.width), scale));
        store_row(op.dtype, scaled, count, rounded);
        vstore(scaled, vmul(load_some<W>(weight, i, op.width), W::load(rounded)));
        store_row(op.dtype, scaled, count, out + i * W::kSize);
    }
}

void rms_norm(const RmsNorm& op, int64_t row) {
    switch (op.dtype) {
        case DType::kFloat32:
            return rms_norm_as<F32>(op, row);
        case DType::kBFloat16:
            return rms_norm_as<Bf16>(op, row);
        default:
            return rms_norm_as<F16>(op, row);
    }
}

}  // namespace
}  // namespace emoe::cpu
