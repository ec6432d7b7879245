#include "cuda/hazards.hpp"

#include <algorithm>
#include <utility>

namespace emoe::cuda {

// A stream is in order with itself, so only the uses by other streams need a wait.
void Hazards::order(Uses& uses, std::uintptr_t longest, Range range, cudaStream_t stream) {
    auto each = uses.lower_bound(range.begin > longest ? range.begin - longest : 0);
    while (each != uses.end() && each->first < range.end) {
        if (each->second.end <= range.begin) {
            ++each;
            continue;
        }
        if (each->second.event.done()) {
            each = uses.erase(each);
            continue;
        }
        if (each->second.stream != stream) each->second.event.before(stream);
        ++each;
    }
}

void Hazards::drop_covered(Uses& uses, Range range) {
    auto each = uses.lower_bound(range.begin);
    while (each != uses.end() && each->first < range.end) {
        each = each->second.end <= range.end ? uses.erase(each) : std::next(each);
    }
}

void Hazards::before_write(Range range, cudaStream_t stream) {
    const std::lock_guard<std::mutex> lock(mutex_);
    order(writes_, longest_, range, stream);
    order(reads_, longest_, range, stream);
}

void Hazards::wrote(Range range, cudaStream_t stream, Event written) {
    const std::lock_guard<std::mutex> lock(mutex_);
    longest_ = std::max(longest_, range.end - range.begin);
    // The write waited for these; who waits for the write waits for them too.
    drop_covered(writes_, range);
    drop_covered(reads_, range);
    writes_.emplace(range.begin, Use{range.end, stream, std::move(written)});
}

void Hazards::before_read(Range range, cudaStream_t stream) {
    const std::lock_guard<std::mutex> lock(mutex_);
    order(writes_, longest_, range, stream);
}

void Hazards::read(Range range, cudaStream_t stream, Event finished) {
    const std::lock_guard<std::mutex> lock(mutex_);
    longest_ = std::max(longest_, range.end - range.begin);
    const auto [first, last] = reads_.equal_range(range.begin);
    for (auto each = first; each != last; ++each) {
        if (each->second.end == range.end && each->second.stream == stream) {
            each->second.event = std::move(finished);  // a later point of the same stream
            return;
        }
    }
    reads_.emplace(range.begin, Use{range.end, stream, std::move(finished)});
}

void Hazards::prune() {
    const std::lock_guard<std::mutex> lock(mutex_);
    std::erase_if(writes_, [](const auto& each) { return each.second.event.done(); });
    std::erase_if(reads_, [](const auto& each) { return each.second.event.done(); });
}

std::size_t Hazards::pending() const {
    const std::lock_guard<std::mutex> lock(mutex_);
    return writes_.size() + reads_.size();
}

}  // namespace emoe::cuda
