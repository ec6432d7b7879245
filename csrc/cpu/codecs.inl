// How codes become small whole numbers, 32 at a time, and their scales, 8 groups of 32 at a time. For the x86 units.
//
// A codec has: kScales, scales of a group (2: one for either half); kMinimum, whether a value has an addend;
// whether that of its first half is another (kHalfMinima); kStep, whether rows are made of whole steps of 8 groups;
// kApart, whether the codes of a group come in the order 0, 2,
// ... 30, 1, 3, ... 31; row() and the two functions of a row.
namespace emoe::cpu {
namespace {

constexpr int kGroup = 32;
constexpr int kGroups = 8;  // of a step

struct RowAt {
    const unsigned char* codes;
    const unsigned char* scales;  // null: `factor` is the scale of all
    const unsigned char* zeros;   // null: none, or all are 8; else a word for each group
    int shift;                    // of its zero within a word
    float factor;
};

// Orders of the 16-bit integers of x: as they are; in each group those of even place first; and, for four groups at a
// time, in four parts as the bytes of their codes lie in a register of 16-bit numbers: where a group's bytes hold its
// first 16 in their low nibbles (kHalfOrder), where they hold neighbours (kNibbleOrder), where they hold groups 0 and
// 2, 1 and 3 (kPairOrder: even and odd of 0 and 2, then of 1 and 3).
enum Order { kPlain, kApartOrder, kHalfOrder, kNibbleOrder, kPairOrder };

template <int kScales>
struct Scales {
    __m256 scale[kScales];
    __m256 minimum;
};

// Where the first half of a group has an addend of its own: that of the second is `minimum`.
struct ScalesOfHalves : Scales<2> {
    __m256 first;  // what the first half's is larger by
};
template <class Q>
constexpr bool kHalfMinima = requires(const Source& a, const RowAt& row) { Q::scales(a, row, 0, 0).first; };

inline __m256 floats_of_f16(__m128i halves) { return _mm256_cvtph_ps(halves); }
inline float one_of_f16(const unsigned char* p) { return _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(half_at(p)))); }
inline __m128i load_bytes16(const unsigned char* p) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)); }
inline __m256i load_bytes32(const unsigned char* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }

// Halves at a distance of kBytes, zero from n on.
template <int kBytes>
inline __m256 strided_f16(const unsigned char* p, int64_t n) {
    alignas(16) uint16_t halves[kGroups] = {};
#if defined(EMOE_QUADS)
    if constexpr (kBytes == 18) {  // within 128 bytes
        if (n >= kGroups) {
            const __m512i at = _mm512_castsi128_si512(_mm_setr_epi16(0, 9, 18, 27, 36, 45, 54, 63));
            const __m512i found = _mm512_permutex2var_epi16(_mm512_loadu_si512(p), at, _mm512_loadu_si512(p + 64));
            return floats_of_f16(_mm512_castsi512_si128(found));
        }
    }
#endif
    if (n >= kGroups) {  // put together in general registers: vector inserts all want the port that widens codes
        const auto four = [&](int i) {
            uint64_t bits = 0;
            for (int j = 3; j >= 0; --j) bits = bits << 16 | half_at(p + (i + j) * kBytes);
            __asm__("" : "+r"(bits));  // else the compiler makes vectors of it
            return (long long)bits;
        };
        return floats_of_f16(_mm_set_epi64x(four(4), four(0)));
    }
    for (int64_t i = 0; i < n; ++i) halves[i] = half_at(p + i * kBytes);
    return floats_of_f16(_mm_load_si128(reinterpret_cast<const __m128i*>(halves)));
}

// 2^(byte - 127); 255 is no number.
inline __m256 floats_of_e8m0(__m128i bytes) {
    const __m256i wide = _mm256_cvtepu8_epi32(bytes);
    const __m256i edge = _mm256_or_si256(_mm256_cmpeq_epi32(wide, _mm256_setzero_si256()),
                                         _mm256_cmpeq_epi32(wide, _mm256_set1_epi32(255)));
    const __m256i bits =
        _mm256_or_si256(_mm256_slli_epi32(wide, 23), _mm256_and_si256(edge, _mm256_set1_epi32(1 << 22)));
    return _mm256_castsi256_ps(bits);
}
// Widened bytes of e4m3 to the float16 that is 2^8 times smaller; 0x7F is no number.
inline __m256i f16_of_e4m3(__m256i wide) {
    const __m256i moved = _mm256_slli_epi16(wide, 7);
    const __m256i value = _mm256_add_epi16(moved, _mm256_and_si256(moved, _mm256_set1_epi16(0x4000)));  // the sign
    const __m256i all = _mm256_set1_epi16(0x3F80);
    return _mm256_or_si256(value, _mm256_srli_epi16(_mm256_cmpeq_epi16(_mm256_and_si256(moved, all), all), 1));
}
// Eight in the low half.
inline __m256 floats_of_e4m3(__m128i bytes) {
    const __m256i halves = f16_of_e4m3(_mm256_cvtepu8_epi16(bytes));
    return _mm256_mul_ps(floats_of_f16(_mm256_castsi256_si128(halves)), _mm256_set1_ps(256.0F));
}

inline int64_t scale_size(ScaleType scale) {
    return scale == ScaleType::kFloat32 ? 4 : scale == ScaleType::kE8M0 || scale == ScaleType::kE4M3 ? 1 : 2;
}

// Eight neighbouring scales.
inline __m256 eight_scales(ScaleType scale, const unsigned char* p) {
    switch (scale) {
        case ScaleType::kFloat32:
            return _mm256_loadu_ps(reinterpret_cast<const float*>(p));
        case ScaleType::kBFloat16:
            return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(load_bytes16(p)), 16));
        case ScaleType::kFloat16:
            return floats_of_f16(load_bytes16(p));
        case ScaleType::kE8M0:
            return floats_of_e8m0(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
        default:
            return floats_of_e4m3(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
    }
}
inline float one_scale(ScaleType scale, const unsigned char* p) {
    unsigned char bytes[kGroups * 4] = {};
    switch (scale) {
        case ScaleType::kFloat32:
            return F32::one(p);
        case ScaleType::kBFloat16:
            return Bf16::one(p);
        case ScaleType::kFloat16:
            return one_of_f16(p);
        default:
            bytes[0] = *p;
            return _mm256_cvtss_f32(eight_scales(scale, bytes));
    }
}
// Scales [i, i + n) of a row, n at most 8; zero after them.
inline __m256 scales_at(ScaleType scale, const unsigned char* scales, int64_t i, int64_t n) {
    const int64_t size = scale_size(scale);
    if (n >= kGroups) return eight_scales(scale, scales + i * size);
    alignas(32) float some[kGroups] = {};
    for (int64_t j = 0; j < n; ++j) some[j] = one_scale(scale, scales + (i + j) * size);
    return _mm256_load_ps(some);
}

// Two neighbouring scales, each four times.
inline __m256 two_scales(ScaleType scale, const unsigned char* p) {
    const auto both = [&] { return _mm_cvtsi32_si128((int)iq::word32(p)); };
    __m128 two;
    switch (scale) {
        case ScaleType::kFloat32:
            two = _mm_castsi128_ps(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
            break;
        case ScaleType::kBFloat16:
            two = _mm_castsi128_ps(_mm_slli_epi32(_mm_cvtepu16_epi32(both()), 16));
            break;
        case ScaleType::kFloat16:
            two = _mm_cvtph_ps(both());
            break;
        default:
            two = _mm_setr_ps(one_scale(scale, p), one_scale(scale, p + 1), 0.0F, 0.0F);
    }
    return _mm256_permutevar8x32_ps(_mm256_castps128_ps256(two), _mm256_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1));
}

// of(i) for each of groups [g0, g0 + n) where value i serves `per` groups.
template <class Of>
inline __m256 each_group(int64_t per, int64_t g0, int64_t n, const Of& of) {
    int64_t i = g0 / per;
    int64_t left = per - g0 % per;
    if (left >= n) return _mm256_set1_ps(of(i));
    if (per == 2 && n == kGroups) {
        const __m128 low = _mm_set_ps(of(i + 1), of(i + 1), of(i), of(i));
        return _mm256_set_m128(_mm_set_ps(of(i + 3), of(i + 3), of(i + 2), of(i + 2)), low);
    }
    alignas(32) float some[kGroups] = {};
    for (int64_t j = 0; j < n;) {
        const float value = of(i++);
        for (const int64_t end = least(n, j + left); j < end; ++j) some[j] = value;
        left = per;
    }
    return _mm256_load_ps(some);
}

inline RowAt block_row(const Source& a, int64_t row, int64_t values, int64_t bytes) {
    return {a.slot + a.w.data + (a.w.first + row * a.w.step) * (a.w.depth / values) * bytes, nullptr, nullptr, 0, 1.0F};
}
inline int64_t groups_of(const Weights& w) {
    return w.scale_cols == 0 ? 1 : (w.depth + w.scale_cols - 1) / w.scale_cols;
}

#if defined(EMOE_QUADS)
// Sixteen bytes of each of four groups.
inline __m512i four_blocks(const unsigned char* p, int64_t apart) {
    __m512i bytes = _mm512_castsi128_si512(load_bytes16(p));
    bytes = _mm512_inserti32x4(bytes, load_bytes16(p + apart), 1);
    bytes = _mm512_inserti32x4(bytes, load_bytes16(p + 2 * apart), 2);
    return _mm512_inserti32x4(bytes, load_bytes16(p + 3 * apart), 3);
}
#endif

// Formats of 32 values: an f16 scale first.
template <int kBytes>
struct Small {
    static constexpr int kScales = 1;
    static constexpr bool kMinimum = false;
    static constexpr bool kStep = false;
    static constexpr bool kApart = false;
    static constexpr int64_t kLine = kBytes * kGroups;  // bytes of a step
    static RowAt row(const Source& a, int64_t row) { return block_row(a, row, kGroup, kBytes); }
    static Scales<1> scales(const Source&, const RowAt& row, int64_t g0, int64_t n) {
        return {{strided_f16<kBytes>(row.codes + g0 * kBytes, n)}, _mm256_setzero_ps()};
    }
};
// Codes from zero on that stand for -kLess to ...
template <int kBytes, int kLess>
struct Offset : Small<kBytes> {
    static constexpr bool kMinimum = true;
    static Scales<1> scales(const Source& a, const RowAt& row, int64_t g0, int64_t n) {
        Scales<1> found = Small<kBytes>::scales(a, row, g0, n);
        found.minimum = _mm256_mul_ps(found.scale[0], _mm256_set1_ps((float)-kLess));
        return found;
    }
};
// An f16 minimum after the scale.
template <int kBytes>
struct Affine : Small<kBytes> {
    static constexpr bool kMinimum = true;
    static Scales<1> scales(const Source& a, const RowAt& row, int64_t g0, int64_t n) {
        Scales<1> found = Small<kBytes>::scales(a, row, g0, n);
        found.minimum = strided_f16<kBytes>(row.codes + g0 * kBytes + 2, n);
        return found;
    }
};

struct Q8_0 : Small<34> {
    template <int>
    static Codes32 codes(const RowAt& row, int64_t g) {
        return load_signed(row.codes + g * 34 + 2);
    }
};
struct Q4_0 : Offset<18, 8> {
    template <int>
    static Codes32 codes(const RowAt& row, int64_t g) {
        return load_halves(row.codes + g * 18 + 2);
    }
#if defined(EMOE_QUADS)
    static constexpr Order kOrder = kHalfOrder;
    static __m256 quad_factor() { return _mm256_set1_ps(1.0F); }
    template <int q>
    static void quad(const RowAt& row, int64_t g, __m512i (&parts)[4]) {
        quad_of_nibbles(four_blocks(row.codes + g * 18 + 2, 18), parts);
    }
#endif
};
struct Q4_1 : Affine<20> {
    template <int>
    static Codes32 codes(const RowAt& row, int64_t g) {
        return load_halves(row.codes + g * 20 + 4);
    }
#if defined(EMOE_QUADS)
    static constexpr Order kOrder = kHalfOrder;
    static __m256 quad_factor() { return _mm256_set1_ps(1.0F); }
    template <int q>
    static void quad(const RowAt& row, int64_t g, __m512i (&parts)[4]) {
        quad_of_nibbles(four_blocks(row.codes + g * 20 + 4, 20), parts);
    }
#endif
};
struct Q5_0 : Offset<22, 16> {
    template <int>
    static Codes32 codes(const RowAt& row, int64_t g) {
        return load_halves_and_bits(row.codes + g * 22 + 6, row.codes + g * 22 + 2);
    }
#if defined(EMOE_QUADS)
    static constexpr Order kOrder = kHalfOrder;
    static __m256 quad_factor() { return _mm256_set1_ps(1.0F); }
    template <int q>
    static void quad(const RowAt& row, int64_t g, __m512i (&parts)[4]) {
        const unsigned char* p = row.codes + g * 22 + 2;
        quad_of_nibbles_and_bits(four_blocks(p + 4, 22), p, 22, parts);
    }
#endif
};
struct Q5_1 : Affine<24> {
    template <int>
    static Codes32 codes(const RowAt& row, int64_t g) {
        return load_halves_and_bits(row.codes + g * 24 + 8, row.codes + g * 24 + 4);
    }
#if defined(EMOE_QUADS)
    static constexpr Order kOrder = kHalfOrder;
    static __m256 quad_factor() { return _mm256_set1_ps(1.0F); }
    template <int q>
    static void quad(const RowAt& row, int64_t g, __m512i (&parts)[4]) {
        const unsigned char* p = row.codes + g * 24 + 4;
        quad_of_nibbles_and_bits(four_blocks(p + 4, 24), p, 24, parts);
    }
#endif
};

// Tables of 16 values that nibbles are looked up in.
inline __m128i table_of(const signed char (&values)[16]) {
    return _mm_loadu_si128(reinterpret_cast<const __m128i*>(values));
}
inline __m128i e2m1_doubled() { return table_of(kE2M1Doubled); }
inline __m128i iq4_values() { return table_of(kIq4Values); }
struct Iq4Nl : Small<18> {
    template <int>
    static Codes32 codes(const RowAt& row, int64_t g) {
        return look_up_halves(row.codes + g * 18 + 2, iq4_values());
    }
#if defined(EMOE_QUADS)
    static constexpr Order kOrder = kHalfOrder;
    static __m256 quad_factor() { return _mm256_set1_ps(1.0F); }
    template <int q>
    static void quad(const RowAt& row, int64_t g, __m512i (&parts)[4]) {
        quad_of_table<false>(four_blocks(row.codes + g * 18 + 2, 18), iq4_values(), parts);
    }
#endif
};
struct Mxfp4Blocks : Small<17> {
    template <int>
    static Codes32 codes(const RowAt& row, int64_t g) {
        return look_up_halves(row.codes + g * 17 + 1, e2m1_doubled());
    }
    static Scales<1> scales(const Source&, const RowAt& row, int64_t g0, int64_t n) {
        uint64_t bytes = 0;
        for (int64_t i = n - 1; i >= 0; --i) bytes = bytes << 8 | row.codes[(g0 + i) * 17];
        // Half of 2^(byte - 127); what is below the smallest normal number is shifted into place.
        const __m256i wide = _mm256_cvtepu8_epi32(_mm_cvtsi64_si128((long long)bytes));
        const __m256i usual = _mm256_slli_epi32(_mm256_sub_epi32(wide, _mm256_set1_epi32(1)), 23);
        const __m256i tiny = _mm256_sllv_epi32(_mm256_set1_epi32(0x00200000), wide);
        const __m256i is_tiny = _mm256_cmpgt_epi32(_mm256_set1_epi32(2), wide);
        return {{_mm256_castsi256_ps(_mm256_blendv_epi8(usual, tiny, is_tiny))}, _mm256_setzero_ps()};
    }
#if defined(EMOE_QUADS)
    static constexpr Order kOrder = kHalfOrder;
    static __m256 quad_factor() { return _mm256_set1_ps(0x1p-8F); }
    template <int q>
    static void quad(const RowAt& row, int64_t g, __m512i (&parts)[4]) {
        quad_of_table<true>(four_blocks(row.codes + g * 17 + 1, 17), e2m1_doubled(), parts);
    }
#endif
};

// Blocks of 256 values.
template <int kBytes, int kScalesOf>
struct Large {
    static constexpr int kScales = kScalesOf;
    static constexpr bool kMinimum = false;
    static constexpr bool kStep = true;
    static constexpr bool kApart = false;
    static constexpr int64_t kLine = kBytes;
    static RowAt row(const Source& a, int64_t row) { return block_row(a, row, 256, kBytes); }
    static const unsigned char* block(const RowAt& row, int64_t g) { return row.codes + g / kGroups * kBytes; }
};
// An f16 scale and an f16 scale of minima, and twelve bytes of eight scales and eight minima, six bits each.
template <int kBytes>
struct WithMinima : Large<kBytes, 1> {
    static constexpr bool kMinimum = true;
    static Scales<1> scales(const Source&, const RowAt& row, int64_t g0, int64_t) {
        const __m128i head = load_bytes16(Large<kBytes, 1>::block(row, g0));
        // Four scales, four more with their low bits elsewhere, and the same of minima.
        const __m128i low = _mm_srlv_epi32(
            _mm_shuffle_epi8(head, _mm_setr_epi8(4, 5, 6, 7, 12, 13, 14, 15, 8, 9, 10, 11, 12, 13, 14, 15)),
            _mm_setr_epi32(0, 0, 0, 4));
        const __m128i high =
            _mm_shuffle_epi8(head, _mm_setr_epi8(-1, -1, -1, -1, 4, 5, 6, 7, -1, -1, -1, -1, 8, 9, 10, 11));
        const __m128i six = _mm_or_si128(_mm_and_si128(low, _mm_set1_epi64x(0x0F0F0F0F3F3F3F3F)),
                                         _mm_and_si128(_mm_srli_epi16(high, 2), _mm_set1_epi8(0x30)));
        const auto floats = [](__m128i bytes) { return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(bytes)); };
        const __m128 both = _mm_xor_ps(_mm_cvtph_ps(head), _mm_setr_ps(0.0F, -0.0F, 0.0F, 0.0F));
        return {{_mm256_mul_ps(floats(six), _mm256_broadcastss_ps(both))},
                _mm256_mul_ps(floats(_mm_srli_si128(six, 8)), _mm256_broadcastss_ps(_mm_movehdup_ps(both)))};
    }
};
// kTo - kFrom to the left; what other bits of a 16-bit lane move in is masked off by the caller.
template <int kBy>
inline __m256i shift(__m256i bytes) {
    if constexpr (kBy > 0) return _mm256_slli_epi16(bytes, kBy);
    if constexpr (kBy < 0) return _mm256_srli_epi16(bytes, -kBy);
    return bytes;
}
// Blocks whose sixteen groups of 16 have a scale each: of two bits, those of 128 values in the same 32 bytes.
template <int kBytes, int kBits>  // kBits: where they begin
struct TwoBits : Large<kBytes, 2> {
    template <int j>
    static __m256i two_bits(const unsigned char* block) {
        const __m256i bytes = load_bytes32(block + kBits + j / 4 * 32);
        return _mm256_and_si256(shift<j % 4 * -2>(bytes), _mm256_set1_epi8(3));
    }
#if defined(EMOE_QUADS)
    static constexpr Order kOrder = kPairOrder;
    // Groups 4 q + i and 4 q + i + 2.
    template <int q, int i>
    static __m512i two_groups(const unsigned char* block) {
        const __m512i twice = _mm512_broadcast_i64x4(load_bytes32(block + kBits + q * 32));
        constexpr int by = 2 * i;
        const __m512i turn = _mm512_setr_epi64(by, by, by, by, by + 4, by + 4, by + 4, by + 4);
        return _mm512_and_si512(_mm512_srlv_epi64(twice, turn), _mm512_set1_epi8(3));
    }
#endif
};
struct Q2_K : TwoBits<84, 16> {
    static constexpr bool kMinimum = true;
    template <int j>
    static Codes32 codes(const RowAt& row, int64_t g) {
        return widen_unsigned(two_bits<j>(block(row, g)));
    }
    static ScalesOfHalves scales(const Source&, const RowAt& row, int64_t g0, int64_t) {
        const unsigned char* p = block(row, g0);
        const __m128i bytes = load_bytes16(p);
        const __m128i scale = _mm_and_si128(bytes, _mm_set1_epi8(15));
        const __m128i minimum = _mm_and_si128(_mm_srli_epi16(bytes, 4), _mm_set1_epi8(15));
        const __m256 d = _mm256_set1_ps(one_of_f16(p + 80));
        const __m256 less = _mm256_set1_ps(-one_of_f16(p + 82));
        const auto of_bytes = [&](__m128i eight) {
            return _mm256_mul_ps(_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(eight)), d);
        };
        const __m256i first = _mm256_cvtepu16_epi32(_mm_and_si128(minimum, _mm_set1_epi16(15)));
        const __m256i second = _mm256_cvtepu16_epi32(_mm_srli_epi16(minimum, 8));
        ScalesOfHalves found;
        found.scale[0] = of_bytes(scale);
        found.scale[1] = of_bytes(_mm_srli_si128(scale, 8));
        found.minimum = _mm256_mul_ps(_mm256_cvtepi32_ps(second), less);
        found.first = _mm256_mul_ps(_mm256_cvtepi32_ps(_mm256_sub_epi32(first, second)), less);
        return found;
    }
#if defined(EMOE_QUADS)
    static __m256 quad_factor() { return _mm256_set1_ps(1.0F); }
    template <int q>
    static void quad(const RowAt& row, int64_t g, __m512i (&parts)[4]) {
        split_unsigned(two_groups<q, 0>(block(row, g)), parts[0], parts[1]);
        split_unsigned(two_groups<q, 1>(block(row, g)), parts[2], parts[3]);
    }
#endif
};
struct Q3_K : TwoBits<110, 32> {
    // Four less where the high bit is not set.
    template <int j>
    static Codes32 codes(const RowAt& row, int64_t g) {
        const unsigned char* p = block(row, g);
        const __m256i high = _mm256_and_si256(shift<2 - j>(load_bytes32(p)), _mm256_set1_epi8(4));
        return widen_signed(_mm256_sub_epi8(_mm256_or_si256(two_bits<j>(p), high), _mm256_set1_epi8(4)));
    }
    static Scales<2> scales(const Source&, const RowAt& row, int64_t g0, int64_t) {
        const unsigned char* p = block(row, g0) + 96;
        const __m128i nibbles = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
        int pairs;
        __builtin_memcpy(&pairs, p + 8, 4);
        const __m128i low = _mm_and_si128(_mm_unpacklo_epi64(nibbles, _mm_srli_epi16(nibbles, 4)), _mm_set1_epi8(15));
        const __m128i high = _mm_srlv_epi32(_mm_set1_epi32(pairs), _mm_setr_epi32(0, 2, 4, 6));
        const __m128i six = _mm_or_si128(low, _mm_slli_epi16(_mm_and_si128(high, _mm_set1_epi8(3)), 4));
        const __m128i scale = _mm_sub_epi8(six, _mm_set1_epi8(32));
        const __m256 d = _mm256_set1_ps(one_of_f16(p + 12));
        const auto of_bytes = [&](__m128i eight) {
            return _mm256_mul_ps(_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(eight)), d);
        };
        return {{of_bytes(scale), of_bytes(_mm_srli_si128(scale, 8))}, _mm256_setzero_ps()};
    }
#if defined(EMOE_QUADS)
    static __m256 quad_factor() { return _mm256_set1_ps(0x1p-8F); }
    template <int q>
    static void quad(const RowAt& row, int64_t g, __m512i (&parts)[4]) {
        const unsigned char* p = block(row, g);
        const __m512i bits = _mm512_broadcast_i64x4(load_bytes32(p));
        const auto less = [&](__m512i codes, int i) {
            const __m256i one = _mm256_set1_epi8((char)(1 << (4 * q + i)));
            const __m256i other = _mm256_set1_epi8((char)(4 << (4 * q + i)));
            const __mmask64 low =
                _mm512_testn_epi8_mask(bits, _mm512_inserti64x4(_mm512_castsi256_si512(one), other, 1));
            return _mm512_mask_sub_epi8(codes, low, codes, _mm512_set1_epi8(4));
        };
        split_large(less(two_groups<q, 0>(p), 0), parts[0], parts[1]);
        split_large(less(two_groups<q, 1>(p), 1), parts[2], parts[3]);
    }
#endif
};
struct Q4_K : WithMinima<144> {
    template <int j>
    static Codes32 codes(const RowAt& row, int64_t g) {
        return nibbles_of<j % 2 * 4>(load_unsigned(block(row, g) + 16 + j / 2 * 32));
    }
#if defined(EMOE_QUADS)
    static constexpr Order kOrder = kPairOrder;
    static __m256 quad_factor() { return _mm256_setr_ps(1, 0x1p-4F, 1, 0x1p-4F, 1, 0x1p-4F, 1, 0x1p-4F); }
    template <int q>
    static void quad(const RowAt& row, int64_t g, __m512i (&parts)[4]) {
        const __m512i bytes = _mm512_loadu_si512(block(row, g) + 16 + q * 64);
        const __m512i odd = _mm512_srli_epi16(bytes, 8);
        parts[0] = _mm512_and_si512(bytes, _mm512_set1_epi16(15));
        parts[1] = _mm512_and_si512(odd, _mm512_set1_epi16(15));
        parts[2] = _mm512_and_si512(bytes, _mm512_set1_epi16(0xF0));  // 16 times as large
        parts[3] = _mm512_and_si512(odd, _mm512_set1_epi16(0xF0));
    }
#endif
};
struct Q5_K : WithMinima<176> {
    template <int j>
    static Codes32 codes(const RowAt& row, int64_t g) {
        const unsigned char* p = block(row, g);
        const __m256i low =
            _mm256_and_si256(shift<j % 2 * -4>(load_bytes32(p + 48 + j / 2 * 32)), _mm256_set1_epi8(15));
        const __m256i high = _mm256_and_si256(shift<4 - j>(load_bytes32(p + 16)), _mm256_set1_epi8(16));
        return widen_unsigned(_mm256_or_si256(low, high));
    }
#if defined(EMOE_QUADS)
    static constexpr Order kOrder = kPairOrder;
    static __m256 quad_factor() { return _mm256_set1_ps(1.0F); }
    template <int q>
    static void quad(const RowAt& row, int64_t g, __m512i (&parts)[4]) {
        const unsigned char* p = block(row, g);
        const __m512i bytes = _mm512_loadu_si512(p + 48 + q * 64);
        const __m512i bits = _mm512_broadcast_i64x4(load_bytes32(p + 16));
        const auto of = [&](int shift) {  // bits `shift` for one group and two further for the other
            const __m256i one = _mm256_set1_epi8((char)(1 << shift));
            const __m256i other = _mm256_set1_epi8((char)(4 << shift));
            return _mm512_test_epi8_mask(bits, _mm512_inserti64x4(_mm512_castsi256_si512(one), other, 1));
        };
        const __m512i low = _mm512_and_si512(bytes, _mm512_set1_epi8(15));
        const __m512i high = _mm512_and_si512(_mm512_srli_epi16(bytes, 4), _mm512_set1_epi8(15));
        const __m512i more = _mm512_set1_epi8(16);
        split_unsigned(_mm512_mask_add_epi8(low, of(4 * q), low, more), parts[0], parts[1]);
        split_unsigned(_mm512_mask_add_epi8(high, of(4 * q + 1), high, more), parts[2], parts[3]);
    }
#endif
};
struct Q6_K : Large<210, 2> {
    template <int j>
    static Codes32 codes(const RowAt& row, int64_t g) {
        const unsigned char* p = block(row, g);
        const __m256i low =
            _mm256_and_si256(shift<j % 4 / 2 * -4>(load_bytes32(p + j / 4 * 64 + j % 2 * 32)), _mm256_set1_epi8(15));
        const __m256i high =
            _mm256_and_si256(shift<4 - j % 4 * 2>(load_bytes32(p + 128 + j / 4 * 32)), _mm256_set1_epi8(48));
        return widen_signed(_mm256_sub_epi8(_mm256_or_si256(low, high), _mm256_set1_epi8(32)));
    }
    static Scales<2> scales(const Source&, const RowAt& row, int64_t g0, int64_t) {
        const unsigned char* p = block(row, g0);
        const __m128i bytes = load_bytes16(p + 192);
        const __m256 d = _mm256_set1_ps(one_of_f16(p + 208));
        return {{_mm256_mul_ps(_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes)), d),
                 _mm256_mul_ps(_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_srli_si128(bytes, 8))), d)},
                _mm256_setzero_ps()};
    }
#if defined(EMOE_QUADS)
    static constexpr Order kOrder = kPairOrder;
    static __m256 quad_factor() { return _mm256_set1_ps(0x1p-8F); }
    template <int q>
    static void quad(const RowAt& row, int64_t g, __m512i (&parts)[4]) {
        const unsigned char* p = block(row, g);
        const __m512i bits = _mm512_broadcast_i64x4(load_bytes32(p + 128 + q * 32));
        const auto pair = [&](int i, __m512i turn, __m512i& even, __m512i& odd) {
            const __m512i twice = _mm512_broadcast_i64x4(load_bytes32(p + q * 64 + i * 32));
            const __m512i moved = _mm512_srlv_epi64(twice, _mm512_setr_epi64(0, 0, 0, 0, 4, 4, 4, 4));
            const __m512i low = _mm512_and_si512(moved, _mm512_set1_epi8(15));
            const __m512i six =
                _mm512_ternarylogic_epi64(_mm512_rolv_epi64(bits, turn), _mm512_set1_epi8(48), low, 0xEA);
            split_large(_mm512_sub_epi8(six, _mm512_set1_epi8(32)), even, odd);
        };
        pair(0, _mm512_setr_epi64(4, 4, 4, 4, 0, 0, 0, 0), parts[0], parts[1]);
        pair(1, _mm512_setr_epi64(2, 2, 2, 2, 62, 62, 62, 62), parts[2], parts[3]);
    }
#endif
};
struct Iq4Xs : Large<136, 1> {
    template <int j>
    static Codes32 codes(const RowAt& row, int64_t g) {
        return look_up_halves(block(row, g) + 8 + j * 16, iq4_values());
    }
    static Scales<1> scales(const Source&, const RowAt& row, int64_t g0, int64_t) {
        const unsigned char* p = block(row, g0);
        uint32_t low;
        __builtin_memcpy(&low, p + 4, 4);
        const __m256i of_low =
            _mm256_srlv_epi32(_mm256_set1_epi32((int)low), _mm256_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28));
        const __m256i of_high =
            _mm256_srlv_epi32(_mm256_set1_epi32(half_at(p + 2)), _mm256_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14));
        const __m256i six = _mm256_or_si256(_mm256_and_si256(of_low, _mm256_set1_epi32(15)),
                                            _mm256_slli_epi32(_mm256_and_si256(of_high, _mm256_set1_epi32(3)), 4));
        const __m256 scale = _mm256_cvtepi32_ps(_mm256_sub_epi32(six, _mm256_set1_epi32(32)));
        return {{_mm256_mul_ps(scale, _mm256_set1_ps(one_of_f16(p)))}, _mm256_setzero_ps()};
    }
#if defined(EMOE_QUADS)
    static constexpr Order kOrder = kHalfOrder;
    static __m256 quad_factor() { return _mm256_set1_ps(1.0F); }
    template <int q>
    static void quad(const RowAt& row, int64_t g, __m512i (&parts)[4]) {
        quad_of_table<false>(_mm512_loadu_si512(block(row, g) + 8 + q * 64), iq4_values(), parts);
    }
#endif
};

// Codes with scales in a plane of their own.
template <int kBytes>
struct Planes {
    static constexpr int kScales = 1;
    static constexpr bool kMinimum = false;
    static constexpr bool kStep = false;
    static constexpr bool kApart = false;
    static constexpr int64_t kLine = kBytes * kGroups;
    static RowAt row(const Source& a, int64_t row) {
        const int64_t at = a.w.first + row * a.w.step;
        const int64_t its_scale = a.w.scale_rows == 0 ? 0 : a.w.scale_rows == 1 ? at : at / a.w.scale_rows;
        const int64_t line = groups_of(a.w) * scale_size(a.w.scale);
        const unsigned char* scales = a.slot + a.w.scales + its_scale * line;
        const bool one = a.w.scale_cols == 0;
        return {a.slot + a.w.data + at * (a.w.depth / kGroup) * kBytes, one ? nullptr : scales, nullptr, 0,
                one ? one_scale(a.w.scale, scales) : 1.0F};
    }
    static __m256 of_groups(const Source& a, const RowAt& row, int64_t g0, int64_t n) {
        const ScaleType scale = a.w.scale;
        if (row.scales == nullptr) return _mm256_set1_ps(1.0F);
        const int64_t per = a.w.scale_cols / kGroup;
        if (per == 1) return scales_at(scale, row.scales, g0, n);
        const int64_t size = scale_size(scale);
        if (per == 4 && n == kGroups) return two_scales(scale, row.scales + g0 / 4 * size);
        return each_group(per, g0, n, [&](int64_t i) { return one_scale(scale, row.scales + i * size); });
    }
    static Scales<1> scales(const Source& a, const RowAt& row, int64_t g0, int64_t n) {
        return {{_mm256_mul_ps(of_groups(a, row, g0, n), _mm256_set1_ps(row.factor))}, _mm256_setzero_ps()};
    }
};
struct Int8 : Planes<32> {
    template <int>
    static Codes32 codes(const RowAt& row, int64_t g) {
        return load_signed(row.codes + g * 32);
    }
};
struct UInt8B128 : Planes<32> {
    template <int>
    static Codes32 codes(const RowAt& row, int64_t g) {
        const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(row.codes + g * 32));
        return widen_signed(_mm256_xor_si256(bytes, _mm256_set1_epi8(-128)));
    }
};
// Floats of one byte.
struct E5M2 : Planes<32> {
    static void values(const RowAt& row, int64_t g, V (&out)[kGroup / L]) { load_e5m2(row.codes + g * 32, out); }
};
struct E4M3 : Planes<32> {  // come 2^8 times too small
    static RowAt row(const Source& a, int64_t row) {
        RowAt found = Planes<32>::row(a, row);
        found.factor *= 256.0F;
        return found;
    }
    static void values(const RowAt& row, int64_t g, V (&out)[kGroup / L]) { load_e4m3(row.codes + g * 32, out); }
#if defined(EMOE_BYTE_TABLES)
    // Of group g and, where `both`, the next, in the order of turned rows of x; zeros in its place where not.
    static void turned(const RowAt& row, int64_t g, bool both, V (&out)[2 * kGroup / L]) {
        look_up_e4m3(_mm512_maskz_loadu_epi8(both ? ~0ULL : 0xFFFFFFFFULL, row.codes + g * 32), out);
    }
    static V scale_of_two(const float* scales) { return turned_scales(scales); }
#endif
};
struct E2M1 : Planes<16> {
    static constexpr bool kApart = true;
    static RowAt row(const Source& a, int64_t row) {
        RowAt found = Planes<16>::row(a, row);
        found.factor *= 0.5F;
        if (a.w.factor >= 0) {
            const float factor = F32::one(a.slot + a.w.factor);
            found.factor = a.w.codes == Codes::kE2M1 ? found.factor * factor : found.factor / factor;
        }
        return found;
    }
    template <int>
    static Codes32 codes(const RowAt& row, int64_t g) {
        return look_up_halves(row.codes + g * 16, e2m1_doubled());
    }
#if defined(EMOE_QUADS)
    static constexpr Order kOrder = kNibbleOrder;
    static __m256 quad_factor() { return _mm256_set1_ps(0x1p-8F); }
    template <int q>
    static void quad(const RowAt& row, int64_t g, __m512i (&parts)[4]) {
        quad_of_table<true>(_mm512_loadu_si512(row.codes + g * 16), e2m1_doubled(), parts);
    }
#endif
};
// A scale for 16 values.
struct E2M1By16 : E2M1 {
    static constexpr int kScales = 2;
    static Scales<2> scales(const Source& a, const RowAt& row, int64_t g0, int64_t n) {
        const __m256 factor = _mm256_set1_ps(row.factor);
        const unsigned char* p = row.scales + 2 * g0 * scale_size(a.w.scale);
        Scales<2> found;
        if (n == kGroups && a.w.scale == ScaleType::kE4M3) {
            const __m256i halves = f16_of_e4m3(_mm256_cvtepu8_epi16(load_bytes16(p)));
            const __m256 by = _mm256_mul_ps(factor, _mm256_set1_ps(256.0F));
            found.scale[0] = _mm256_mul_ps(floats_of_f16(_mm256_castsi256_si128(halves)), by);
            found.scale[1] = _mm256_mul_ps(floats_of_f16(_mm256_extracti128_si256(halves, 1)), by);
        } else {
            const __m256 low = scales_at(a.w.scale, p, 0, least(2 * n, kGroups));
            const __m256 high = scales_at(a.w.scale, p, kGroups, least(2 * n - kGroups, kGroups));
            found.scale[0] = _mm256_mul_ps(low, factor);
            found.scale[1] = _mm256_mul_ps(high, factor);
        }
        found.minimum = _mm256_setzero_ps();
        return found;
    }
};
struct Int4 : Planes<16> {
    static constexpr bool kMinimum = true;
    static constexpr bool kApart = true;
    static RowAt row(const Source& a, int64_t row) {
        RowAt found = Planes<16>::row(a, row);
        const int64_t at = a.w.first + row * a.w.step;
        found.zeros = a.w.zeros < 0 ? nullptr : a.slot + a.w.zeros + at / 8 * groups_of(a.w) * 4;
        found.shift = (int)(at % 8 * 4);
        return found;
    }
    template <int>
    static Codes32 codes(const RowAt& row, int64_t g) {
        return load_halves(row.codes + g * 16);
    }
    static Scales<1> scales(const Source& a, const RowAt& row, int64_t g0, int64_t n) {
        const __m256 scale = _mm256_mul_ps(of_groups(a, row, g0, n), _mm256_set1_ps(row.factor));
        return {{scale}, _mm256_mul_ps(scale, _mm256_sub_ps(_mm256_setzero_ps(), zeros(a, row, g0, n)))};
    }
    static __m256 zeros(const Source& a, const RowAt& row, int64_t g0, int64_t n) {
        if (row.zeros == nullptr) return _mm256_set1_ps(8.0F);
        const int64_t per = a.w.scale_cols / kGroup;
        const __m128i by = _mm_cvtsi32_si128(row.shift);
        const __m256i low = _mm256_set1_epi32(15);
        if (n == kGroups && per == 1) {
            return _mm256_cvtepi32_ps(_mm256_and_si256(_mm256_srl_epi32(load_bytes32(row.zeros + g0 * 4), by), low));
        }
        if (n == kGroups && per == 4) {
            const __m128i two = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(row.zeros + g0));
            const __m256i both = _mm256_permutevar8x32_epi32(_mm256_castsi128_si256(_mm_srl_epi32(two, by)),
                                                             _mm256_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1));
            return _mm256_cvtepi32_ps(_mm256_and_si256(both, low));
        }
        const auto zero = [&](int64_t i) { return (float)(row.zeros[i * 4 + row.shift / 8] >> row.shift % 8 & 15); };
        return per == 0 ? _mm256_set1_ps(zero(0)) : each_group(per, g0, n, zero);
    }
#if defined(EMOE_QUADS)
    static constexpr Order kOrder = kNibbleOrder;
    static __m256 quad_factor() { return _mm256_set1_ps(1.0F); }
    template <int q>
    static void quad(const RowAt& row, int64_t g, __m512i (&parts)[4]) {
        quad_of_nibbles(_mm512_loadu_si512(row.codes + g * 16), parts);
    }
#endif
};

}  // namespace
}  // namespace emoe::cpu
