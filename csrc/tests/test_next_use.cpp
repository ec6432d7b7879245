// What the eviction policy learns: against the definition written out in doubles, and what it must not mind.
#include "core/next_use.hpp"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <random>
#include <set>
#include <vector>

#include "tests/check.hpp"

using namespace emoe;

namespace {

constexpr std::array<double, 5> kTokens{2, 6, 20, 60, 200};
constexpr std::array<double, 15> kWeights{0.0458, -0.1638, 0.5584, -0.7613, 0.2445, -0.8804, 0.9023, 0.0062,
                                          0.0258, 0.0237,  0.0040, -0.0018, 0.0032, 0.0658,  0.8404};

// The definition, from all picks so far: text[t] are those of token t.
double defined(const std::vector<std::vector<std::int64_t>>& text, std::int64_t expert) {
    const auto used = [&](std::size_t t, std::int64_t e) {
        return std::find(text[t].begin(), text[t].end(), e) != text[t].end();
    };
    std::array<double, 7> values{};
    double uses = 0;
    for (std::size_t t = 0; t < text.size(); ++t) {
        for (std::size_t i = 0; i < 5; ++i) {
            const double fade = std::exp(-1 / kTokens[i]);
            values[i] = values[i] * fade + (used(t, expert) ? 1 - fade : 0);
        }
        uses += used(t, expert);
    }
    const double share = uses / static_cast<double>(text.size());
    values[5] = share;
    for (const std::int64_t pick : text.back()) {
        double followed = 0;
        double together = 0;
        for (std::size_t t = 0; t + 1 < text.size(); ++t) {
            if (!used(t, pick)) continue;
            ++followed;
            together += used(t + 1, expert);
        }
        values[6] += (together + 20 * share) / (followed + 20) / static_cast<double>(text.back().size());
    }
    double sum = kWeights[14];
    for (std::size_t i = 0; i < 7; ++i) sum += kWeights[i] * values[i] + kWeights[7 + i] * std::log(values[i] + 1e-3);
    return sum;
}

std::vector<std::vector<std::int64_t>> random_text(std::size_t tokens, std::int64_t experts, std::size_t top_k) {
    std::mt19937 random(7);
    std::vector<std::vector<std::int64_t>> text(tokens);
    for (auto& token : text) {
        std::set<std::int64_t> picks;
        // Squares: low ids are picked more often.
        while (picks.size() < top_k) {
            const double draw = std::uniform_real_distribution<double>(0, 1)(random);
            picks.insert(static_cast<std::int64_t>(draw * draw * static_cast<double>(experts)));
        }
        token.assign(picks.begin(), picks.end());
        std::shuffle(token.begin(), token.end(), random);
    }
    return text;
}

}  // namespace

TEST("scores are those of the definition, token by token") {
    const auto text = random_text(300, 24, 4);
    NextUse learned;
    std::vector<std::vector<std::int64_t>> so_far;
    for (const auto& token : text) {
        learned.saw(token, 1);
        so_far.push_back(token);
        for (const std::int32_t expert : {0, 3, 11, 23}) {
            CHECK(std::abs(learned.score(expert) - defined(so_far, expert)) < 1e-4);
        }
    }
}

TEST("a prompt at once teaches what its tokens teach one by one") {
    const auto text = random_text(50, 16, 2);
    NextUse one_by_one;
    NextUse at_once;
    std::vector<std::int64_t> rows;
    for (const auto& token : text) {
        one_by_one.saw(token, 1);
        rows.insert(rows.end(), token.begin(), token.end());
    }
    at_once.saw(rows, text.size());
    for (std::int32_t expert = 0; expert < 16; ++expert) CHECK_EQ(at_once.score(expert), one_by_one.score(expert));
}

TEST("a step of as many rows as the last is one token of a batch of texts") {
    NextUse batch;
    NextUse text;
    batch.saw(std::vector<std::int64_t>{0, 1, 2, 3}, 2);  // a prompt of two tokens
    text.saw(std::vector<std::int64_t>{0, 1, 2, 3}, 2);
    batch.saw(std::vector<std::int64_t>{4, 5, 5, 6}, 2);
    text.saw(std::vector<std::int64_t>{4, 5, 6}, 1);
    for (std::int32_t expert = 0; expert < 8; ++expert) CHECK_EQ(batch.score(expert), text.score(expert));
}

TEST("ids that are no experts, and tokens without picks, teach nothing") {
    NextUse learned;
    learned.saw(std::vector<std::int64_t>{1, 2}, 1);
    NextUse other;
    other.saw(std::vector<std::int64_t>{1, -1, 2, std::int64_t{1} << 40}, 1);
    other.saw(std::vector<std::int64_t>{-1, -1, -1, -1}, 1);
    other.saw({}, 0);
    for (std::int32_t expert = 0; expert < 4; ++expert) CHECK_EQ(other.score(expert), learned.score(expert));
    CHECK_ERROR(ErrorKind::kConfig, learned.saw(std::vector<std::int64_t>{1, 2, 3}, 2));
}

TEST("of equals the first leaves, also before anything was seen") {
    NextUse learned;
    CHECK_EQ(learned.least(std::vector<std::int32_t>{5, 4, 9}), std::size_t{0});
    learned.saw(std::vector<std::int64_t>{4}, 1);
    CHECK_EQ(learned.least(std::vector<std::int32_t>{4, 9, 5}), std::size_t{1});
}

TEST("counts of pairs never run over: past 65535 tokens the older half counts half") {
    NextUse learned;
    for (int i = 0; i < 70'000; ++i) learned.saw(std::vector<std::int64_t>{0, 1}, 1);
    NextUse fewer;
    for (int i = 0; i < 60'000; ++i) fewer.saw(std::vector<std::int64_t>{0, 1}, 1);
    CHECK(std::abs(learned.score(1) - fewer.score(1)) < 1e-3);
}

EMOE_TEST_MAIN
