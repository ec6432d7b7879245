// GGUF's IQ formats. 256 numbers of a row are a block, eight groups of 32. A number is a level of a grid, with a sign
// or an eighth more or less, times an odd number that its group of 32 or half of that has, times a scale of the block.
// In no name: every unit of an instruction set keeps its own.
//
// A format has: kBytes of a block, kHalves (whether halves of a group have scales of their own), Entry (as wide as it
// has values, eight or four), kBy (what its whole numbers are multiplied by, beside unit() and scale()), and of a block
// p entry l of group g, its signs (bit i of 32) or offsets, the scale of half h, and the f16 bits of unit().
#pragma once

#include "core/codes.hpp"
#include "core/grids.hpp"

namespace emoe::iq {
namespace {

template <class T, int kEntries>
struct Grid {
    T of[kEntries];
};
template <class T, int kEntries, int kLevels>
constexpr Grid<T, kEntries> grid_of(const unsigned short (&packed)[kEntries], const signed char (&levels)[kLevels],
                                    int times) {
    constexpr int kValues = sizeof(T);
    constexpr int kBits = 16 / kValues;
    Grid<T, kEntries> grid{};
    for (int i = 0; i < kEntries; ++i) {
        for (int v = 0; v < kValues; ++v) {
            const int level = levels[packed[i] >> (v * kBits) & ((1 << kBits) - 1)];
            grid.of[i] |= static_cast<T>(static_cast<unsigned char>(level * times)) << (8 * v);
        }
    }
    return grid;
}
using Eight = unsigned long long;
using Four = unsigned;
constexpr auto kIq2Xxs = grid_of<Eight>(kIq2XxsPacked, kIq2XxsLevels, 1);
constexpr auto kIq2Xs = grid_of<Eight>(kIq2XsPacked, kIq2XsLevels, 1);
constexpr auto kIq2S = grid_of<Eight>(kIq2SPacked, kIq2SLevels, 1);
constexpr auto kIq3Xxs = grid_of<Four>(kIq3XxsPacked, kIq3XxsLevels, 1);
constexpr auto kIq3S = grid_of<Four>(kIq3SPacked, kIq3SLevels, 1);
constexpr auto kIq1 = grid_of<Eight>(kIq1Packed, kIq1Levels, 8);  // in eighths, as offsets are

inline unsigned word16(const unsigned char* p) {
    unsigned short bits;
    __builtin_memcpy(&bits, p, 2);
    return bits;
}
inline unsigned word32(const unsigned char* p) {
    unsigned bits;
    __builtin_memcpy(&bits, p, 4);
    return bits;
}
// Seven signs a byte; the eighth makes their number even.
constexpr unsigned even_signs(unsigned seven) {
    unsigned odd = seven ^ seven >> 4;
    odd ^= odd >> 2;
    odd ^= odd >> 1;
    return seven | (odd & 0x01010101U) << 7;
}
// Four times seven bits, a byte for each.
constexpr unsigned sevens(unsigned word) {
    return (word & 0x7FU) | (word << 1 & 0x7F00U) | (word << 2 & 0x7F0000U) | (word << 3 & 0x7F000000U);
}
constexpr int odd_number(unsigned half) { return 2 * static_cast<int>(half) + 1; }
constexpr unsigned nibble_of(const unsigned char* p, int i) { return p[i / 2] >> (i % 2 * 4) & 15U; }

struct UnitFirst {
    static unsigned unit(const unsigned char* p) { return word16(p); }
};

struct Iq2Xxs : UnitFirst {
    static constexpr int kBytes = 66;
    static constexpr bool kHalves = false;
    using Entry = Eight;
    static constexpr float kBy = 0.125F;
    static Entry entry(const unsigned char* p, int g, int l) { return kIq2Xxs.of[p[2 + 8 * g + l]]; }
    static unsigned signs(const unsigned char* p, int g) { return even_signs(sevens(word32(p + 6 + 8 * g))); }
    static int scale(const unsigned char* p, int h) { return odd_number(p[9 + h / 2 * 8] >> 4); }
};
struct Iq2Xs : UnitFirst {
    static constexpr int kBytes = 74;
    static constexpr bool kHalves = true;
    using Entry = Eight;
    static constexpr float kBy = 0.125F;
    static Entry entry(const unsigned char* p, int g, int l) { return kIq2Xs.of[word16(p + 2 + 8 * g + 2 * l) & 511U]; }
    static unsigned signs(const unsigned char* p, int g) {
        Eight four;
        __builtin_memcpy(&four, p + 2 + 8 * g, 8);
        four = four >> 9 & 0x007F007F007F007FULL;
        four |= four >> 8;
        return even_signs(static_cast<unsigned>((four & 0xFFFFU) | (four >> 16 & 0xFFFF0000U)));
    }
    static int scale(const unsigned char* p, int h) { return odd_number(nibble_of(p + 66, h)); }
};
struct Iq2S : UnitFirst {
    static constexpr int kBytes = 82;
    static constexpr bool kHalves = true;
    using Entry = Eight;
    static constexpr float kBy = 0.125F;
    static Entry entry(const unsigned char* p, int g, int l) {
        return kIq2S.of[p[2 + 4 * g + l] | (p[66 + g] >> (2 * l) & 3) << 8];
    }
    static unsigned signs(const unsigned char* p, int g) { return word32(p + 34 + 4 * g); }
    static int scale(const unsigned char* p, int h) { return odd_number(nibble_of(p + 74, h)); }
};
struct Iq3Xxs : UnitFirst {
    static constexpr int kBytes = 98;
    static constexpr bool kHalves = false;
    using Entry = Four;
    static constexpr float kBy = 0.25F;
    static Entry entry(const unsigned char* p, int g, int l) { return kIq3Xxs.of[p[2 + 8 * g + l]]; }
    static unsigned signs(const unsigned char* p, int g) { return even_signs(sevens(word32(p + 66 + 4 * g))); }
    static int scale(const unsigned char* p, int h) { return odd_number(p[69 + h / 2 * 4] >> 4); }
};
struct Iq3S : UnitFirst {
    static constexpr int kBytes = 110;
    static constexpr bool kHalves = false;
    using Entry = Four;
    static constexpr float kBy = 1.0F;
    static Entry entry(const unsigned char* p, int g, int l) {
        return kIq3S.of[p[2 + 8 * g + l] | (p[66 + g] >> l & 1) << 8];
    }
    static unsigned signs(const unsigned char* p, int g) { return word32(p + 74 + 4 * g); }
    static int scale(const unsigned char* p, int h) { return odd_number(nibble_of(p + 106, h / 2)); }
};
struct Iq1S : UnitFirst {
    static constexpr int kBytes = 50;
    static constexpr bool kHalves = false;
    using Entry = Eight;
    static constexpr float kBy = 0.125F;
    static Entry entry(const unsigned char* p, int g, int l) {
        return kIq1.of[p[2 + 4 * g + l] | (word16(p + 34 + 2 * g) >> (3 * l) & 7U) << 8];
    }
    static int offset(const unsigned char* p, int g, int) { return p[35 + 2 * g] & 0x80 ? -1 : 1; }
    static int scale(const unsigned char* p, int h) { return odd_number(p[35 + h / 2 * 2] >> 4 & 7U); }
};
struct Iq1M {
    static constexpr int kBytes = 56;
    static constexpr bool kHalves = true;
    using Entry = Eight;
    static constexpr float kBy = 0.125F;
    static unsigned unit(const unsigned char* p) {
        return word16(p + 48) >> 12 | (word16(p + 50) >> 8 & 0xF0U) | (word16(p + 52) >> 4 & 0xF00U) |
               (word16(p + 54) & 0xF000U);
    }
    static unsigned high(const unsigned char* p, int g, int l) { return p[32 + 2 * g + l / 2] >> (l % 2 * 4) & 15U; }
    static Entry entry(const unsigned char* p, int g, int l) {
        return kIq1.of[p[4 * g + l] | (high(p, g, l) & 7U) << 8];
    }
    static int offset(const unsigned char* p, int g, int l) { return high(p, g, l) & 8U ? -1 : 1; }
    static int scale(const unsigned char* p, int h) {
        return odd_number(word16(p + 48 + h / 4 * 2) >> (h % 4 * 3) & 7U);
    }
};

}  // namespace
}  // namespace emoe::iq
