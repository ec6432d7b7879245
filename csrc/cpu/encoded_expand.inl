// Some rows of encoded weights as floats, for tiles: what expand() gives, by the vectors of the unit.
namespace emoe::cpu {
namespace {

constexpr int64_t kRowsAtOnce = 8;

// Columns [k0, k1) of rows [first, first + count) to `to`, ld apart; k0 is a multiple of 256, count at most
// kRowsAtOnce.
using Expand = void (*)(const Source&, int64_t first, int64_t count, int64_t k0, int64_t k1, float* to, int64_t ld);

inline void expand_slowly(const Source& a, int64_t first, int64_t count, int64_t k0, int64_t k1, float* to,
                          int64_t ld) {
    for (int64_t r = 0; r < count; ++r) expand(a.w, a.slot, first + r, k0, k1, to + r * ld);
}

template <class W>
void expand_plain(const Source& a, int64_t first, int64_t count, int64_t k0, int64_t k1, float* to, int64_t ld) {
    for (int64_t r = 0; r < count; ++r) {
        const unsigned char* from = a.slot + a.w.data + (a.w.first + (first + r) * a.w.step) * a.w.depth * W::kSize;
        float* row = to + r * ld - k0;
        int64_t k = k0;
        for (; k + L <= k1; k += L) vstore(row + k, W::load(from + k * W::kSize));
        for (; k < k1; ++k) row[k] = W::one(from + k * W::kSize);
    }
}

#if defined(EMOE_INTEGERS)
template <class Q>
void expand_groups(const Source& a, int64_t first, int64_t count, int64_t k0, int64_t k1, float* to, int64_t ld) {
    const int64_t g1 = k1 / kGroup;
    for (int64_t r = 0; r < count; ++r) {
        const RowAt row = Q::row(a, first + r);
        float* out = to + r * ld - k0;
        for (int64_t g0 = k0 / kGroup; g0 < g1; g0 += kGroups) {
            constexpr int S = Q::kScales;
            const int64_t n = least(kGroups, g1 - g0);
            const auto found = Q::scales(a, row, g0, n);
            alignas(32) float scale[kGroups * S];
            alignas(32) float minimum[kGroups] = {};  // of either half
            alignas(32) float more[kGroups] = {};     // what that of the first has more
            for (int s = 0; s < S; ++s) _mm256_store_ps(scale + s * kGroups, found.scale[s]);
            if constexpr (Q::kMinimum) _mm256_store_ps(minimum, found.minimum);
            if constexpr (kHalfMinima<Q>) _mm256_store_ps(more, found.first);
            const auto group = [&]<int j>(int64_t at) __attribute__((always_inline)) {
                float* values = out + (g0 + at) * kGroup;
                if constexpr (requires { &Q::values; }) {
                    V parts[kGroup / L];
                    Q::values(row, g0 + at, parts);
                    for (int i = 0; i < kGroup / L; ++i) vstore(values + i * L, vmul(parts[i], vset(scale[at])));
                } else {
                    Codes32 codes = Q::template codes<j>(row, g0 + at);
                    if constexpr (Q::kApart) codes = together(codes);
                    store_values<S>(values, codes, scale + at * S, minimum[at] + more[at], minimum[at]);
                }
            };
            if (Q::kStep || n == kGroups) {
                group.template operator()<0>(0);
                group.template operator()<1>(1);
                group.template operator()<2>(2);
                group.template operator()<3>(3);
                group.template operator()<4>(4);
                group.template operator()<5>(5);
                group.template operator()<6>(6);
                group.template operator()<7>(7);
            } else {
                for (int64_t j = 0; j < n; ++j) group.template operator()<0>(j);
            }
        }
    }
}

// Eight rows of vectors become eight columns.
inline void store_turned(const __m256 (&v)[8], float* to, int64_t ld) {
    __m256 a[8];
    __m256 b[8];
    for (int i = 0; i < 4; ++i) {
        a[2 * i] = _mm256_unpacklo_ps(v[2 * i], v[2 * i + 1]);
        a[2 * i + 1] = _mm256_unpackhi_ps(v[2 * i], v[2 * i + 1]);
    }
    for (int i = 0; i < 2; ++i) {
        for (int j = 0; j < 2; ++j) {
            b[4 * i + 2 * j] = _mm256_shuffle_ps(a[4 * i + j], a[4 * i + j + 2], 0x44);
            b[4 * i + 2 * j + 1] = _mm256_shuffle_ps(a[4 * i + j], a[4 * i + j + 2], 0xEE);
        }
    }
    for (int i = 0; i < 4; ++i) {
        _mm256_storeu_ps(to + i * ld, _mm256_permute2f128_ps(b[i], b[i + 4], 0x20));
        _mm256_storeu_ps(to + (i + 4) * ld, _mm256_permute2f128_ps(b[i], b[i + 4], 0x31));
    }
}

// AWQ and GPTQ: eight outputs are neighbours.
template <bool kAwq>
void expand_columns(const Source& a, int64_t first, int64_t count, int64_t k0, int64_t k1, float* to, int64_t ld) {
    const int64_t at = a.w.first + first;
    const int64_t per = a.w.scale_cols == 0 ? a.w.depth : a.w.scale_cols;
    const __m256i shifts = word_shifts(kAwq);
    const __m256i low = _mm256_set1_epi32(15);
    const auto eight = [&](const unsigned char* word) {
        int bits;
        __builtin_memcpy(&bits, word, 4);
        return _mm256_and_si256(_mm256_srlv_epi32(_mm256_set1_epi32(bits), shifts), low);
    };
    if (count != kRowsAtOnce) return expand_slowly(a, first, count, k0, k1, to, ld);
    __m256 scale = _mm256_setzero_ps();
    __m256 less = _mm256_setzero_ps();
    for (int64_t k = k0; k < k1; k += 8) {
        if (k == k0 || k % per == 0) {
            scale = group_scales(a, k / per, at, less);
        }
        __m256 values[8];
        for (int i = 0; i < 8; ++i) {
            __m256i code;
            if constexpr (kAwq) {
                code = eight(a.slot + a.w.data + ((k + i) * (a.w.rows / 8) + at / 8) * 4);
            } else {
                const __m256i words = load_bytes32(a.slot + a.w.data + (k / 8 * a.w.rows + at) * 4);
                code = _mm256_and_si256(_mm256_srlv_epi32(words, _mm256_set1_epi32(4 * i)), low);
            }
            values[i] = _mm256_mul_ps(scale, _mm256_sub_ps(_mm256_cvtepi32_ps(code), less));
        }
        store_turned(values, to + k - k0, ld);
    }
}

using EncodedRows = void (*)(const Source&, int64_t first, int64_t count, int rows, const uint32_t* x, float* y);

// What the unit has for some weights; null where only expand() knows them.
struct Fast {
    EncodedRows rows;
    Expand expand;
    bool floats;          // nothing of x is rounded by `rows`
    bool turned = false;  // `rows` meets x in another order
};
template <class Q>
constexpr Fast kFast = {tiled_rows<Q>, expand_groups<Q>, requires { &Q::values; }, kTurned<Q>};
constexpr Fast kNone = {nullptr, nullptr, false};

inline Fast fast_of(const Weights& w) {
    const bool whole = w.depth % kGroup == 0 && w.scale_cols % kGroup == 0;
    switch (w.codes) {
        case Codes::kQ8_0:
            return kFast<Q8_0>;
        case Codes::kQ4_0:
            return kFast<Q4_0>;
        case Codes::kQ4_1:
            return kFast<Q4_1>;
        case Codes::kQ5_0:
            return kFast<Q5_0>;
        case Codes::kQ5_1:
            return kFast<Q5_1>;
        case Codes::kQ2_K:
            return kFast<Q2_K>;
        case Codes::kQ3_K:
            return kFast<Q3_K>;
        case Codes::kQ4_K:
            return kFast<Q4_K>;
        case Codes::kQ5_K:
            return kFast<Q5_K>;
        case Codes::kQ6_K:
            return kFast<Q6_K>;
        case Codes::kIq1S:
            return kFast<OfGrid<iq::Iq1S>>;
        case Codes::kIq1M:
            return kFast<OfGrid<iq::Iq1M>>;
        case Codes::kIq2Xxs:
            return kFast<OfGrid<iq::Iq2Xxs>>;
        case Codes::kIq2Xs:
            return kFast<OfGrid<iq::Iq2Xs>>;
        case Codes::kIq2S:
            return kFast<OfGrid<iq::Iq2S>>;
        case Codes::kIq3Xxs:
            return kFast<OfGrid<iq::Iq3Xxs>>;
        case Codes::kIq3S:
            return kFast<OfGrid<iq::Iq3S>>;
        case Codes::kIq4Nl:
            return kFast<Iq4Nl>;
        case Codes::kIq4Xs:
            return kFast<Iq4Xs>;
        case Codes::kMxfp4Blocks:
            return kFast<Mxfp4Blocks>;
        case Codes::kInt8:
            return whole ? kFast<Int8> : kNone;
        case Codes::kUInt8B128:
            return whole ? kFast<UInt8B128> : kNone;
        case Codes::kInt4:
            return whole ? kFast<Int4> : kNone;
        case Codes::kE2M1:
        case Codes::kE2M1Divided:
            if (w.depth % kGroup == 0 && w.scale_cols == 16) return kFast<E2M1By16>;
            return whole ? kFast<E2M1> : kNone;
        case Codes::kE4M3:
            return whole ? kFast<E4M3> : kNone;
        case Codes::kE5M2:
            return whole ? kFast<E5M2> : kNone;
        case Codes::kAwq:
            return whole && columns_of_words(w) ? Fast{awq_rows, expand_columns<true>, false} : kNone;
        case Codes::kGptq:
        case Codes::kGptqV2:
            return whole && columns_of_words(w) ? Fast{gptq_rows, expand_columns<false>, false} : kNone;
        default:
            return kNone;
    }
}
// Null where rows of x in `dtype` do not meet these weights as whole numbers: what comes in float32 is not rounded.
inline EncodedRows fast_rows(const Weights& w, DType dtype) {
    const Fast fast = fast_of(w);
    return fast.floats || dtype != DType::kFloat32 ? fast.rows : nullptr;
}
#endif

// The slow one where only expand() knows these weights.
inline Expand expander(const Weights& w) {
    switch (w.codes) {
        case Codes::kFloat32:
            return expand_plain<F32>;
        case Codes::kBFloat16:
            return expand_plain<Bf16>;
        case Codes::kFloat16:
            return expand_plain<F16>;
        default:
#if defined(EMOE_INTEGERS)
            if (const Expand fast = fast_of(w).expand) return fast;
#endif
            return expand_slowly;
    }
}

}  // namespace
}  // namespace emoe::cpu
