// The warp instructions of emu.hpp by their register layouts in the PTX ISA, and cp.async.
#include <string>

#include "tests/cuda_emulation/emu_internal.hpp"

namespace emu {
namespace {

float element(std::uint32_t bits, int half, bool bf16) {
    const auto narrow = static_cast<std::uint16_t>(bits >> (16 * half));
    if (bf16) return __uint_as_float(static_cast<std::uint32_t>(narrow) << 16);
    __half_raw raw;
    raw.x = narrow;
    return __half2float(raw);
}

struct Mma {
    const std::uint32_t* a;
    const std::uint32_t* b;
    float* c;
    bool bf16;
};

// mma.sync.aligned.m16n8k16.row.col: lane l holds, with g = l / 4 and q = 2 (l % 4),
// a: rows g, g + 8 (registers 0, 1) at k = q, q + 1, and at k + 8 (registers 2, 3); b: column g at k = q, q + 1, and at
// k + 8; c: rows g (0, 1) and g + 8 (2, 3) at columns q, q + 1.
void multiply(void* const* arguments, int lanes) {
    if (lanes != 32) die("mma in a warp of fewer than 32 threads");
    float a[16][16], b[16][8];
    for (int l = 0; l < 32; ++l) {
        const Mma& mine = *static_cast<const Mma*>(arguments[l]);
        const int g = l / 4;
        const int q = 2 * (l % 4);
        for (int half = 0; half < 2; ++half) {
            for (int i = 0; i < 4; ++i) {
                a[g + 8 * (i % 2)][q + half + 8 * (i / 2)] = element(mine.a[i], half, mine.bf16);
            }
            for (int i = 0; i < 2; ++i) b[q + half + 8 * i][g] = element(mine.b[i], half, mine.bf16);
        }
    }
    double sums[16][8] = {};
    for (int r = 0; r < 16; ++r) {
        for (int k = 0; k < 16; ++k) {
            for (int n = 0; n < 8; ++n) sums[r][n] += static_cast<double>(a[r][k]) * static_cast<double>(b[k][n]);
        }
    }
    for (int l = 0; l < 32; ++l) {
        float* const c = static_cast<const Mma*>(arguments[l])->c;
        for (int i = 0; i < 4; ++i) {
            c[i] = static_cast<float>(static_cast<double>(c[i]) + sums[l / 4 + 8 * (i / 2)][2 * (l % 4) + i % 2]);
        }
    }
}

struct Ldmatrix {
    std::uint16_t row[8];  // of matrix l / 8, row l % 8
    std::uint32_t* r;
};

// ldmatrix.m8n8.x4: lane l receives of each matrix row l / 4, elements 2 (l % 4) and the next; transposed: column
// l / 4, rows 2 (l % 4) and the next.
void distribute(void* const* arguments, int lanes, bool trans) {
    if (lanes != 32) die("ldmatrix in a warp of fewer than 32 threads");
    for (int l = 0; l < 32; ++l) {
        for (int m = 0; m < 4; ++m) {
            std::uint32_t both = 0;
            for (int half = 0; half < 2; ++half) {
                const int i = l / 4;
                const int j = 2 * (l % 4) + half;
                const auto& row = static_cast<const Ldmatrix*>(arguments[8 * m + (trans ? j : i)])->row;
                both |= static_cast<std::uint32_t>(row[trans ? i : j]) << (16 * half);
            }
            static_cast<const Ldmatrix*>(arguments[l])->r[m] = both;
        }
    }
}

struct Word {
    std::uint32_t in;
    std::uint32_t out;
    int mask;
};

}  // namespace

void require_aligned16(const void* p, const char* what) {
    if (reinterpret_cast<std::uintptr_t>(p) % 16 == 0) return;
    die((std::string(what) + " at an address that is not 16-byte aligned").c_str());
}

std::uint32_t ballot(bool value) {
    Word word{value ? 1U : 0U, 0, 0};
    collective(Collective::kBallot, &word, [](void* const* arguments, int lanes) {
        std::uint32_t bits = 0;
        for (int l = 0; l < lanes; ++l) bits |= static_cast<const Word*>(arguments[l])->in << l;
        for (int l = 0; l < lanes; ++l) static_cast<Word*>(arguments[l])->out = bits;
    });
    return word.out;
}

std::uint32_t shuffle_xor(std::uint32_t bits, int mask) {
    Word word{bits, 0, mask};
    collective(Collective::kShuffle, &word, [](void* const* arguments, int) {
        for (int l = 0; l < 32; ++l) {
            Word& mine = *static_cast<Word*>(arguments[l]);
            mine.out = static_cast<const Word*>(arguments[l ^ mine.mask])->in;
        }
    });
    return word.out;
}

void mma_m16n8k16(float* c, const std::uint32_t* a, const std::uint32_t* b, bool bf16) {
    Mma mine{a, b, c, bf16};
    collective(Collective::kMma, &mine, multiply);
}

void ldmatrix_x4(std::uint32_t* r, const void* row, bool trans) {
    require_aligned16(row, "ldmatrix");
    Ldmatrix mine;
    std::memcpy(mine.row, row, 16);  // by the lane that names it, so that sanitizers see who reads
    mine.r = r;
    collective(trans ? Collective::kLdmatrixTrans : Collective::kLdmatrix, &mine,
               [trans](void* const* arguments, int lanes) { distribute(arguments, lanes, trans); });
}

// The target holds nothing from here to the wait; on a GPU the bytes may come at any time between.
void copy_async16(void* shared, const void* global, bool take) {
    require_aligned16(shared, "cp.async to shared memory");
    require_aligned16(global, "cp.async from global memory");
    std::memset(shared, 0xFF, 16);
    const Quiet quiet;
    current->copies.push_back({shared, take ? global : nullptr});
}

void copy_async_commit() {
    const Quiet quiet;
    Lane& lane = *current;
    std::size_t before = 0;
    for (const std::size_t size : lane.groups) before += size;
    lane.groups.push_back(lane.copies.size() - before);
}

void copy_async_wait(int left) {
    Lane& lane = *current;
    std::size_t count = 0;
    {
        const Quiet quiet;  // not over the copies: these are the program's
        while (lane.groups.size() > static_cast<std::size_t>(left)) {
            count += lane.groups.front();
            lane.groups.erase(lane.groups.begin());
        }
    }
    for (std::size_t i = 0; i < count; ++i) {
        Copy copy;
        {
            const Quiet quiet;
            copy = lane.copies[i];
        }
        if (copy.from == nullptr) {
            std::memset(copy.to, 0, 16);
        } else {
            std::memcpy(copy.to, copy.from, 16);
        }
    }
    const Quiet quiet;
    lane.copies.erase(lane.copies.begin(), lane.copies.begin() + static_cast<std::ptrdiff_t>(count));
}

}  // namespace emu
