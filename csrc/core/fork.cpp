#include "core/fork.hpp"

#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <vector>

namespace emoe {
namespace {

std::atomic<std::uint64_t> generation{0};

struct Registry {
    std::mutex mutex;                 // held from before a fork until after it
    std::vector<ForkMutex*> members;  // in the order of their levels
};

void before_fork();
void in_parent();
void in_child();

// Never destroyed: a queue may outlive the statics of this file.
Registry& registry() {
    static Registry* const one = [] {
        ::pthread_atfork(&before_fork, &in_parent, &in_child);
        return new Registry;
    }();
    return *one;
}

void before_fork() {
    registry().mutex.lock();
    for (ForkMutex* each : registry().members) each->lock();
}

void in_parent() {
    for (ForkMutex* each : registry().members) each->unlock();
    registry().mutex.unlock();
}

void in_child() {
    generation.fetch_add(1, std::memory_order_relaxed);
    in_parent();
}

}  // namespace

std::uint64_t fork_generation() noexcept {
    registry();  // from here on forks are counted
    return generation.load(std::memory_order_relaxed);
}

ForkMutex::ForkMutex(Level level) : level_(level) {
    Registry& all = registry();
    const std::lock_guard lock(all.mutex);
    const auto after = std::find_if(all.members.begin(), all.members.end(),
                                    [&](const ForkMutex* each) { return each->level() > level; });
    all.members.insert(after, this);
}

ForkMutex::~ForkMutex() {
    Registry& all = registry();
    const std::lock_guard lock(all.mutex);
    std::erase(all.members, this);
}

}  // namespace emoe
