// Which experts of one layer a text is likely to use soon, learned from its picks while it runs: no profile, no tasks.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

namespace emoe {

// A linear model of exp(-tokens until the next use / 20) over seven values of an expert, their logarithms and a
// constant: exponential averages of its use over 2, 6, 20, 60 and 200 tokens, the share of all tokens that used it, and
// how often it followed the experts of the last token. The weights were fitted once, on public traces.
// Not thread-safe.
class NextUse {
  public:
    static constexpr std::size_t kWindows = 5;

    // Picks of consecutive tokens, row by row [tokens, top_k]; ids below 0 or over 65535 are no picks. A step of
    // several rows that follows one of as many is a batch of texts: one token whose picks are those of all rows.
    void saw(std::span<const std::int64_t> picks, std::size_t tokens);

    // The higher, the sooner; the same for an expert that was never seen.
    float score(std::int32_t expert);

    // Place of the lowest score, the first of equals; at least one expert.
    std::size_t least(std::span<const std::int32_t> experts);

    // Bytes of what was learned.
    std::size_t bytes() const;

  private:
    struct Expert {
        std::array<float, kWindows> recent{};
        std::uint64_t uses = 0;
        std::uint32_t followed = 0;            // tokens after which `followers` counted
        std::vector<std::uint16_t> followers;  // how often each expert was among the picks of the token after
        float score = 0.0F;
        std::uint64_t scored = 0;  // the token of `score`
    };

    void token(std::span<const std::int64_t> picks);
    void follow(Expert& before, std::span<const std::int64_t> picks);
    float compute(std::size_t expert) const;

    std::vector<Expert> experts_;
    std::vector<std::int64_t> last_;  // picks of the last token, each once
    std::vector<std::int64_t> now_;
    std::uint64_t tokens_ = 0;
    std::size_t rows_ = 0;  // of the last step
};

}  // namespace emoe
