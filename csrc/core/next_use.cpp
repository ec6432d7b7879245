#include "core/next_use.hpp"

#include <algorithm>
#include <cmath>
#include <limits>
#include <string>
#include <utility>

#include "core/error.hpp"

namespace emoe {
namespace {

constexpr std::size_t kValues = NextUse::kWindows + 2;
constexpr std::array<float, NextUse::kWindows> kTokens{2, 6, 20, 60, 200};
constexpr float kPrior = 20.0F;  // tokens that an expert's share counts for among those that follow another
constexpr float kLeast = 1e-3F;  // added before a logarithm
// Least squares on 400 samples of a public Qwen3-30B-A3B trace (code and math): values, logarithms, constant. They hold
// on domains and models that were not in it (docs/traces.md).
constexpr std::array<float, 2 * kValues + 1> kWeights{0.0458F,  -0.1638F, 0.5584F, -0.7613F, 0.2445F,
                                                      -0.8804F, 0.9023F,  0.0062F, 0.0258F,  0.0237F,
                                                      0.0040F,  -0.0018F, 0.0032F, 0.0658F,  0.8404F};
constexpr std::int64_t kMostExperts = 1 << 16;

std::array<float, NextUse::kWindows> fades() {
    std::array<float, NextUse::kWindows> fade{};
    for (std::size_t i = 0; i < fade.size(); ++i) fade[i] = std::exp(-1.0F / kTokens[i]);
    return fade;
}

const std::array<float, NextUse::kWindows> kFade = fades();

[[noreturn]] void refuse(std::string message) { throw Error(ErrorKind::kConfig, std::move(message)); }

}  // namespace

void NextUse::saw(std::span<const std::int64_t> picks, std::size_t tokens) {
    if (!tokens) return;
    if (picks.size() % tokens)
        refuse(std::to_string(picks.size()) + " picks are not of " + std::to_string(tokens) + " tokens");
    const bool texts = tokens > 1 && tokens == rows_;
    const std::size_t top_k = picks.size() / tokens;
    rows_ = tokens;
    if (texts) return token(picks);
    for (std::size_t i = 0; i < tokens; ++i) token(picks.subspan(i * top_k, top_k));
}

void NextUse::token(std::span<const std::int64_t> picks) {
    now_.clear();
    for (const std::int64_t pick : picks)
        if (pick >= 0 && pick < kMostExperts) now_.push_back(pick);
    std::sort(now_.begin(), now_.end());
    now_.erase(std::unique(now_.begin(), now_.end()), now_.end());
    if (now_.empty()) return;  // a token that skips the layer
    if (const auto count = static_cast<std::size_t>(now_.back()) + 1; count > experts_.size()) {
        experts_.resize(count);
    }
    for (Expert& each : experts_)
        for (std::size_t i = 0; i < kWindows; ++i) each.recent[i] *= kFade[i];
    for (const std::int64_t before : last_) follow(experts_[static_cast<std::size_t>(before)], now_);
    for (const std::int64_t pick : now_) {
        Expert& used = experts_[static_cast<std::size_t>(pick)];
        for (std::size_t i = 0; i < kWindows; ++i) used.recent[i] += 1.0F - kFade[i];
        ++used.uses;
    }
    last_.swap(now_);
    ++tokens_;
}

void NextUse::follow(Expert& before, std::span<const std::int64_t> picks) {
    if (before.followers.size() < experts_.size()) {
        before.followers.reserve(experts_.size());  // no more: it is the square of the experts
        before.followers.resize(experts_.size());
    }
    if (before.followed == std::numeric_limits<std::uint16_t>::max()) {  // the older half counts half from here on
        before.followed /= 2;
        for (std::uint16_t& each : before.followers) each = static_cast<std::uint16_t>(each / 2);
    }
    ++before.followed;
    for (const std::int64_t pick : picks) ++before.followers[static_cast<std::size_t>(pick)];
}

float NextUse::score(std::int32_t expert) {
    if (expert < 0 || static_cast<std::size_t>(expert) >= experts_.size()) {
        return compute(std::numeric_limits<std::size_t>::max());
    }
    Expert& each = experts_[static_cast<std::size_t>(expert)];
    if (each.scored != tokens_) {
        each.score = compute(static_cast<std::size_t>(expert));
        each.scored = tokens_;
    }
    return each.score;
}

float NextUse::compute(std::size_t expert) const {
    std::array<float, kValues> values{};
    const float share =
        expert < experts_.size() && tokens_
            ? static_cast<float>(static_cast<double>(experts_[expert].uses) / static_cast<double>(tokens_))
            : 0.0F;
    if (expert < experts_.size()) std::copy_n(experts_[expert].recent.begin(), kWindows, values.begin());
    values[kWindows] = share;
    float following = 0.0F;
    for (const std::int64_t pick : last_) {
        const Expert& before = experts_[static_cast<std::size_t>(pick)];
        const float count = expert < before.followers.size() ? static_cast<float>(before.followers[expert]) : 0.0F;
        following += (count + kPrior * share) / (static_cast<float>(before.followed) + kPrior);
    }
    if (!last_.empty()) following /= static_cast<float>(last_.size());
    values[kWindows + 1] = following;
    float sum = kWeights[2 * kValues];
    for (std::size_t i = 0; i < kValues; ++i) {
        sum += kWeights[i] * values[i] + kWeights[kValues + i] * std::log(values[i] + kLeast);
    }
    return sum;
}

std::size_t NextUse::least(std::span<const std::int32_t> experts) {
    std::size_t place = 0;
    float lowest = std::numeric_limits<float>::infinity();
    for (std::size_t i = 0; i < experts.size(); ++i) {
        if (const float each = score(experts[i]); each < lowest) lowest = each, place = i;
    }
    return place;
}

std::size_t NextUse::bytes() const {
    std::size_t total = experts_.capacity() * sizeof(Expert);
    for (const Expert& each : experts_) total += each.followers.capacity() * sizeof(std::uint16_t);
    return total;
}

}  // namespace emoe
