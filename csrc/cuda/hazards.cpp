#include "cuda/hazards.hpp"

#include <algorithm>
#include <utility>

namespace emoe::cuda {

// A stream is in order with itself, so only the uses by other streams need a wait.
void Hazards::order(Uses& uses, Range range, cudaStream_t stream) {
    auto& all = uses.by_begin;
    auto each = all.lower_bound(range.begin > uses.longest ? range.begin - uses.longest : 0);
    while (each != all.end() && each->first < range.end) {
        if (each->second.end <= range.begin) {
            ++each;
            continue;
        }
        if (each->second.event.done()) {
            each = all.erase(each);
            continue;
        }
        if (each->second.stream != stream) each->second.event.before(stream);
        ++each;
    }
}

template <typename Of>
void Hazards::drop_covered(Uses& uses, Range range, Of&& of) {
    auto each = uses.by_begin.lower_bound(range.begin);
    while (each != uses.by_begin.end() && each->first < range.end) {
        const bool covered = each->second.end <= range.end && of(each->second);
        each = covered ? uses.by_begin.erase(each) : std::next(each);
    }
}

void Hazards::add(Uses& uses, Range range, cudaStream_t stream, Event event) {
    uses.longest = std::max(uses.longest, range.end - range.begin);
    uses.by_begin.emplace(range.begin, Use{range.end, stream, std::move(event)});
}

void Hazards::before_write(Range range, cudaStream_t stream) {
    const std::lock_guard<std::mutex> lock(mutex_);
    order(writes_, range, stream);
    order(reads_, range, stream);
}

void Hazards::wrote(Range range, cudaStream_t stream, Event written) {
    const std::lock_guard<std::mutex> lock(mutex_);
    // The write waited for these; who waits for the write waits for them too.
    const auto any = [](const Use&) { return true; };
    drop_covered(writes_, range, any);
    drop_covered(reads_, range, any);
    add(writes_, range, stream, std::move(written));
}

void Hazards::before_read(Range range, cudaStream_t stream) {
    const std::lock_guard<std::mutex> lock(mutex_);
    order(writes_, range, stream);
}

void Hazards::read(Range range, cudaStream_t stream, Event finished) {
    const std::lock_guard<std::mutex> lock(mutex_);
    // A later point of the same stream stands for its earlier ones.
    drop_covered(reads_, range, [&](const Use& use) { return use.stream == stream; });
    add(reads_, range, stream, std::move(finished));
}

void Hazards::prune() {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (Uses* uses : {&writes_, &reads_}) {
        std::erase_if(uses->by_begin, [](const auto& each) { return each.second.event.done(); });
    }
}

std::size_t Hazards::pending() const {
    const std::lock_guard<std::mutex> lock(mutex_);
    return writes_.by_begin.size() + reads_.by_begin.size();
}

}  // namespace emoe::cuda
