// What a child of fork() finds: locks that nobody holds, and a count that tells an object that it is in another process
// than the one that made it. Threads, rings and devices do not survive; whoever has some looks at the count.
#pragma once

#include <cstdint>
#include <mutex>

namespace emoe {

// 0 in the first process, one more in a child of it, and so on.
std::uint64_t fork_generation() noexcept;

// A mutex that is taken for the moment of a fork, so that in the child it is free and what it guards is whole. No other
// one may be made or destroyed while one is held.
class ForkMutex : public std::mutex {
  public:
    enum class Level : std::uint8_t { kQueue, kFiles, kTable, kReader };  // where two are held: in this order
    explicit ForkMutex(Level level);
    ~ForkMutex();
    ForkMutex(const ForkMutex&) = delete;
    ForkMutex& operator=(const ForkMutex&) = delete;
    Level level() const noexcept { return level_; }

  private:
    const Level level_;
};

}  // namespace emoe
