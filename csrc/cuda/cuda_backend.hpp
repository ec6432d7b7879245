// The Backend of one CUDA device: its memory, copies on copy streams of its own, and compute on the caller's stream.
// A copy into memory that kernels still read waits for them on the device; the host waits for nothing but room.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "core/backend.hpp"
#include "core/job_queue.hpp"
#include "cuda/hazards.hpp"
#include "cuda/kernels.hpp"
#include "cuda/runtime.hpp"

namespace emoe::cuda {

// Pinned chunks through which small or pageable host data goes up. A chunk is written again only after the copy out of
// it is over. One thread at a time (CudaBackend's mutex).
class Staging {
  public:
    Staging(std::size_t chunks, std::size_t chunk_bytes, int device);
    std::size_t chunk_bytes() const noexcept { return chunk_bytes_; }
    // Blocks while every chunk is in flight. The chunk is the caller's until sent().
    std::byte* next();
    void sent(Event copied);  // the copy out of the chunk that next() gave

  private:
    const std::size_t chunk_bytes_;
    PinnedBuffer memory_;
    std::vector<Event> copied_;
    std::size_t at_ = 0;
};

struct CudaOptions {
    // A copy is made in pieces of so many bytes. The engine takes them in the order they are issued in, whatever the
    // stream and its priority, so a demand waits for the pieces of prefetches that are in flight, and for no more.
    std::size_t piece_bytes = std::size_t{4} << 20;
    // Bytes of pieces given to a lane's stream and not over; one piece may always be.
    std::size_t demand_in_flight = std::size_t{64} << 20;
    std::size_t prefetch_in_flight = std::size_t{8} << 20;
    std::size_t staging_chunks = 4;
    std::size_t staging_chunk_bytes = std::size_t{1} << 20;
};

// Every member function may be called from any thread. A stream is a cudaStream_t of the same device; nullptr is the
// default stream. Of those that take a stream, gather_mlp_resident alone may be given one that captures a graph; the
// others refuse it with TransferError. While a thread captures, allocate() fails and free() keeps the memory.
class CudaBackend final : public Backend {
  public:
    explicit CudaBackend(int device, CudaOptions options = {});  // BackendUnavailable, ConfigError, BudgetError
    ~CudaBackend() override;                                     // waits for its copies
    CudaBackend(const CudaBackend&) = delete;
    CudaBackend& operator=(const CudaBackend&) = delete;

    int device() const noexcept { return device_; }

    std::string_view name() const noexcept override { return "cuda"; }
    bool supports(const GatherMlp& op) const noexcept override;
    Memory allocate(std::size_t bytes) override;
    void free(Memory memory) noexcept override;  // waits for what still uses it
    // Returns when the kernels are enqueued on `stream` (a cudaStream_t), ordered after the copies into their slots.
    void gather_mlp(const GatherMlp& op, void* stream) override;

    // Copies pinned memory into device memory on the lane's stream, after every kernel that was said to read `dst`.
    // Blocks while the lane has too many bytes in flight. `src` is free again when the event is over.
    Event copy(Memory dst, std::span<const std::byte> src, Lane lane);
    // The same on the demand lane, or nothing where it would block.
    std::optional<Event> copy_now(Memory dst, std::span<const std::byte> src);
    // Copies of pageable memory, through staging, on the demand lane: `src` may change when copy_async returns, and the
    // ticket says when the bytes are there. TransferError for a ticket that was never issued.
    Ticket copy_async(Memory dst, std::span<const std::byte> src);
    bool done(Ticket ticket) const;
    void wait(Ticket ticket);
    void order_after(Ticket ticket, cudaStream_t stream);
    // As gather_mlp, but the slot table too is device memory, and scratch is the caller's: nothing is copied, allocated
    // or waited for. `slots` are the ranges that the table may name. On a stream that captures a graph it only
    // launches, and each replay goes between begin_read and end_read of the slots that the table names by then.
    // ConfigError where the workspace is smaller than workspace_bytes(op), or not aligned.
    void gather_mlp_resident(const Mlp& op, std::span<const Range> slots, Memory workspace, cudaStream_t stream);
    // For kernels of others, and for replays of a captured graph: between the two calls, what is given to `stream` may
    // read these ranges. begin_read waits on the device for copies into them, end_read holds back later ones.
    void begin_read(std::span<const Range> ranges, cudaStream_t stream);
    void end_read(std::span<const Range> ranges, cudaStream_t stream);

    // The slot table of a layer for what `stream` gets next, without a copy (kernels.hpp).
    void write_table(Memory dst, std::span<const std::int32_t> slot_of, cudaStream_t stream);
    // Bytes a second of host-to-device copies of this size from pinned memory, with the lane's bound in flight.
    double copy_rate(std::size_t bytes, int copies);
    void finish_copies();  // blocks until no copy of either lane is in flight

    // Small copies: emulated tensors. On `stream`, through staging; download blocks until it is over.
    void upload(Memory dst, std::span<const std::byte> src, cudaStream_t stream);
    void download(std::span<std::byte> dst, const std::byte* src, cudaStream_t stream);

  private:
    struct LaneState {
        std::mutex copying;  // a lane's copies are issued one at a time
        std::mutex mutex;    // taken after `copying`; guards what follows
        std::unique_ptr<Stream> stream;
        std::deque<std::pair<Event, std::size_t>> in_flight;  // pieces and their bytes
        std::size_t bytes = 0;                                // of these
        std::size_t bound = 1;
    };
    struct Scratch {  // of one compute stream, which orders its uses
        Memory table, workspace;
    };

    LaneState& lane(Lane which) { return lanes_[static_cast<std::size_t>(which)]; }
    Event event_of(Ticket ticket) const;
    bool has_room(LaneState& lane, std::size_t bytes, Event* oldest = nullptr);
    void make_room(LaneState& lane, std::size_t bytes);
    Event copy_pieces(LaneState& on, Memory dst, std::span<const std::byte> src);
    Memory grown(Memory memory, std::size_t bytes, cudaStream_t stream);
    std::vector<Range> slots_of(const GatherMlp& op) const;

    const int device_;
    const CudaOptions options_;
    std::shared_ptr<EventPool> events_;
    std::array<LaneState, 2> lanes_;
    Hazards hazards_;

    mutable std::mutex mutex_;  // guards what follows
    std::map<std::uintptr_t, std::size_t> allocated_;
    std::map<std::uint64_t, Event> tickets_;  // those that may not be over
    std::uint64_t next_ticket_ = 1;

    std::mutex staging_mutex_;  // guards staging_
    Staging staging_;
    std::mutex scratch_mutex_;  // guards scratch_
    std::map<cudaStream_t, Scratch> scratch_;
};

}  // namespace emoe::cuda
