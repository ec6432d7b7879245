#include "cuda/cuda_backend.hpp"

#include <algorithm>
#include <chrono>
#include <cstring>
#include <utility>

#include "core/error.hpp"
#include "cuda/kernels.hpp"

namespace emoe::cuda {
namespace {

int checked(int device) {
    require_device(device);
    return device;
}

}  // namespace

Staging::Staging(std::size_t chunks, std::size_t chunk_bytes, int device)
    : chunk_bytes_(chunk_bytes), memory_(chunks * chunk_bytes, device), copied_(chunks) {}

std::byte* Staging::next() {
    copied_[at_].synchronize();
    return memory_.data() + at_ * chunk_bytes_;
}

void Staging::sent(Event copied) {
    copied_[at_] = std::move(copied);
    at_ = (at_ + 1) % copied_.size();
}

CudaBackend::CudaBackend(int device, CudaOptions options)
    : device_(checked(device)),
      options_(options),
      events_(EventPool::make(device)),
      staging_(options.staging_chunks, options.staging_chunk_bytes, device) {
    if (options.piece_bytes < 1) throw Error(ErrorKind::kConfig, "piece_bytes=0; a piece has at least 1 byte");
    lane(Lane::kDemand).stream = std::make_unique<Stream>(device);
    lane(Lane::kDemand).bound = options.demand_in_flight;
    lane(Lane::kPrefetch).stream = std::make_unique<Stream>(device);
    lane(Lane::kPrefetch).bound = options.prefetch_in_flight;
}

CudaBackend::~CudaBackend() {
    // Scratch belongs to kernels on the caller's streams, so the whole device has to be quiet before it goes.
    try {
        const DeviceScope scope(device_);
        cudaDeviceSynchronize();
        for (const auto& [stream, scratch] : scratch_) {
            cudaFree(scratch.table.data);
            cudaFree(scratch.workspace.data);
        }
        for (const auto& [address, bytes] : allocated_) cudaFree(reinterpret_cast<void*>(address));
    } catch (const Error&) {
        // The device is lost, and its memory with it.
    }
}

bool CudaBackend::supports(const GatherMlp& op) const noexcept {
    return cuda::supports(op.layout) && op.mode == OutMode::kPairs;
}

Memory CudaBackend::allocate(std::size_t bytes) {
    const DeviceScope scope(device_);
    void* data = nullptr;
    const cudaError_t code = cudaMalloc(&data, bytes);
    if (code != cudaSuccess) {
        std::size_t free = 0;
        std::size_t total = 0;
        cudaMemGetInfo(&free, &total);
        check(code, "allocating ", bytes, " bytes on device ", device_, ", which has ", free, " of ", total, " free");
    }
    const Memory memory{static_cast<std::byte*>(data), bytes, false};
    try {
        const LaneState& demand = lane(Lane::kDemand);
        check(cudaMemsetAsync(data, 0, bytes, demand.stream->get()), "clearing ", bytes, " bytes on device ", device_);
        demand.stream->synchronize();
    } catch (...) {
        cudaFree(data);
        throw;
    }
    const std::lock_guard<std::mutex> lock(mutex_);
    allocated_.emplace(reinterpret_cast<std::uintptr_t>(data), bytes);
    return memory;
}

void CudaBackend::free(Memory memory) noexcept {
    if (memory.data == nullptr) return;
    try {
        const DeviceScope scope(device_);
        check(cudaDeviceSynchronize(), "waiting for device ", device_);
        const std::lock_guard<std::mutex> lock(mutex_);
        if (allocated_.erase(reinterpret_cast<std::uintptr_t>(memory.data)) != 0) cudaFree(memory.data);
    } catch (const Error&) {
        // The device is lost, and its memory with it; or a stream captures, and the memory stays until the backend
        // goes.
    }
}

bool CudaBackend::has_room(LaneState& lane, std::size_t bytes, Event* oldest) {
    const std::lock_guard<std::mutex> lock(lane.mutex);
    while (!lane.in_flight.empty() && lane.in_flight.front().first.done()) {
        lane.bytes -= lane.in_flight.front().second;
        lane.in_flight.pop_front();
    }
    if (lane.in_flight.empty() || lane.bytes + bytes <= lane.bound) return true;
    if (oldest != nullptr) *oldest = lane.in_flight.front().first;
    return false;
}

void CudaBackend::make_room(LaneState& lane, std::size_t bytes) {
    Event oldest;
    while (!has_room(lane, bytes, &oldest)) oldest.synchronize();
}

Event CudaBackend::copy(Memory dst, std::span<const std::byte> src, Lane which) {
    refuse_lost_device();  // before a lock that a thread of the parent may have held
    LaneState& on = lane(which);
    const std::lock_guard<std::mutex> one_at_a_time(on.copying);
    return copy_pieces(on, dst, src);
}

std::optional<Event> CudaBackend::copy_now(Memory dst, std::span<const std::byte> src) {
    refuse_lost_device();
    LaneState& on = lane(Lane::kDemand);
    const std::unique_lock<std::mutex> one_at_a_time(on.copying, std::try_to_lock);
    if (!one_at_a_time || src.size() > on.bound || !has_room(on, src.size())) return std::nullopt;
    return copy_pieces(on, dst, src);
}

// `copying` of the lane is held.
Event CudaBackend::copy_pieces(LaneState& on, Memory dst, std::span<const std::byte> src) {
    if (src.size() > dst.bytes) {
        throw Error(ErrorKind::kConfig, "a copy of " + std::to_string(src.size()) + " bytes does not fit into " +
                                            std::to_string(dst.bytes));
    }
    const Range range = range_of(dst.data, src.size());
    const DeviceScope scope(device_);
    const cudaStream_t stream = on.stream->get();
    Event copied;
    std::size_t at = 0;
    all_or_over(stream, [&] {
        do {
            const std::size_t bytes = std::min(options_.piece_bytes, src.size() - at);
            make_room(on, bytes);
            if (at == 0) hazards_.before_write(range, stream);
            check(cudaMemcpyAsync(dst.data + at, src.data() + at, bytes, cudaMemcpyHostToDevice, stream), "copying ",
                  bytes, " of ", src.size(), " bytes to device ", device_);
            copied = events_->record(stream);
            at += bytes;
            const std::lock_guard<std::mutex> lock(on.mutex);
            on.in_flight.emplace_back(copied, bytes);
            on.bytes += bytes;
        } while (at < src.size());
    });
    hazards_.wrote(range, stream, copied);
    return copied;
}

double CudaBackend::copy_rate(std::size_t bytes, int copies) {
    const PinnedBuffer source(bytes, device_);
    std::memset(source.data(), 0, bytes);
    const Memory target = allocate(bytes);
    try {
        copy(target, {source.data(), bytes}, Lane::kDemand).synchronize();
        const auto start = std::chrono::steady_clock::now();
        for (int i = 0; i < copies; ++i) copy(target, {source.data(), bytes}, Lane::kDemand);
        finish_copies();
        const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
        free(target);
        return static_cast<double>(bytes) * copies / seconds.count();
    } catch (...) {
        free(target);  // waits for the copies, which read `source`
        throw;
    }
}

void CudaBackend::finish_copies() {
    refuse_lost_device();  // before a lock that a thread of the parent may have held
    for (LaneState& each : lanes_) {
        const std::lock_guard<std::mutex> one_at_a_time(each.copying);
        const std::lock_guard<std::mutex> lock(each.mutex);
        for (const auto& [copied, bytes] : each.in_flight) copied.synchronize();
        each.in_flight.clear();
        each.bytes = 0;
    }
}

Ticket CudaBackend::copy_async(Memory dst, std::span<const std::byte> src) {
    // The source may be pageable, which a copy engine cannot read while the host goes on: it goes through staging.
    Event last;
    for (std::size_t at = 0; at < src.size(); at += staging_.chunk_bytes()) {
        const std::size_t bytes = std::min(staging_.chunk_bytes(), src.size() - at);
        const std::lock_guard<std::mutex> lock(staging_mutex_);
        std::byte* const chunk = staging_.next();
        std::memcpy(chunk, src.data() + at, bytes);
        last = copy(Memory{dst.data + at, dst.bytes - at, false}, {chunk, bytes}, Lane::kDemand);
        staging_.sent(last);
    }
    const std::lock_guard<std::mutex> lock(mutex_);
    std::erase_if(tickets_, [](const auto& each) { return each.second.done(); });
    const Ticket ticket{next_ticket_++};
    tickets_.emplace(ticket.id, std::move(last));
    return ticket;
}

Event CudaBackend::event_of(Ticket ticket) const {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (ticket.id == 0 || ticket.id >= next_ticket_) {
        throw Error(ErrorKind::kTransfer, "ticket " + std::to_string(ticket.id) + " was never issued by this device");
    }
    const auto found = tickets_.find(ticket.id);
    return found == tickets_.end() ? Event() : found->second;
}

bool CudaBackend::done(Ticket ticket) const { return event_of(ticket).done(); }

void CudaBackend::wait(Ticket ticket) { event_of(ticket).synchronize(); }

void CudaBackend::order_after(Ticket ticket, cudaStream_t stream) {
    const DeviceScope scope(device_);
    event_of(ticket).before(stream);
}

void CudaBackend::upload(Memory dst, std::span<const std::byte> src, cudaStream_t stream) {
    refuse_lost_device();  // before a lock that a thread of the parent may have held
    if (src.size() > dst.bytes) {
        throw Error(ErrorKind::kConfig, "an upload of " + std::to_string(src.size()) + " bytes does not fit into " +
                                            std::to_string(dst.bytes));
    }
    const std::lock_guard<std::mutex> lock(staging_mutex_);
    const DeviceScope scope(device_);
    refuse_capture(stream, "a replay would copy what the host's memory then holds");
    for (std::size_t at = 0; at < src.size(); at += staging_.chunk_bytes()) {
        const std::size_t bytes = std::min(staging_.chunk_bytes(), src.size() - at);
        std::byte* const chunk = staging_.next();
        std::memcpy(chunk, src.data() + at, bytes);
        all_or_over(stream, [&] {
            check(cudaMemcpyAsync(dst.data + at, chunk, bytes, cudaMemcpyHostToDevice, stream), "copying ", bytes,
                  " bytes to device ", device_);
            staging_.sent(events_->record(stream));
        });
    }
}

void CudaBackend::download(std::span<std::byte> dst, const std::byte* src, cudaStream_t stream) {
    refuse_lost_device();  // before a lock that a thread of the parent may have held
    const std::lock_guard<std::mutex> lock(staging_mutex_);
    const DeviceScope scope(device_);
    refuse_capture(stream, "the host cannot wait for a copy that only a replay makes");
    for (std::size_t at = 0; at < dst.size(); at += staging_.chunk_bytes()) {
        const std::size_t bytes = std::min(staging_.chunk_bytes(), dst.size() - at);
        std::byte* const chunk = staging_.next();
        check(cudaMemcpyAsync(chunk, src + at, bytes, cudaMemcpyDeviceToHost, stream), "copying ", bytes,
              " bytes from device ", device_);
        Event arrived;
        all_or_over(stream, [&] { arrived = events_->record(stream); });
        staging_.sent(arrived);
        arrived.synchronize();
        std::memcpy(dst.data() + at, chunk, bytes);
    }
}

}  // namespace emoe::cuda
