// The CUDA runtime with errors that carry values and handles that clean up: devices, streams, events, pinned memory.
// Host code only; decides nothing about order.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <sstream>
#include <string>
#include <vector>

namespace emoe::cuda {

// Throws emoe::Error for a code other than cudaSuccess: "cudaErrorX (text) while <what>". Out of memory is kBudget, no
// driver or device kBackendUnavailable, anything else kTransfer.
[[noreturn]] void raise(cudaError_t code, const std::string& what);

// `what` is only put together when there is something to say.
template <typename... Parts>
void check(cudaError_t code, const Parts&... what) {
    if (code == cudaSuccess) return;
    std::ostringstream text;
    (text << ... << what);
    raise(code, text.str());
}

struct DeviceInfo {
    int index = 0;
    std::string name;
    int major = 0;
    int minor = 0;
    std::size_t total_bytes = 0;
};

struct Status {
    int driver = 0;   // 12080 for 12.8; 0: none
    int runtime = 0;  // likewise, what this module was built with
    std::vector<DeviceInfo> devices;
    std::string problem;  // "" where a device can be used; otherwise which of driver, device, build is missing
};

// Looks without choosing a device and without throwing.
Status look_around();
// BackendUnavailable where nothing can be used; ConfigError where this index is none of the devices.
void require_device(int device);

// CUDA does not survive fork(). True in a child of the process that used it first: then no handle is given back.
bool device_lost() noexcept;
void refuse_lost_device();  // BackendUnavailable where it is

// Makes a device current for a scope. BackendUnavailable in a child of the process that used CUDA first.
class DeviceScope {
  public:
    explicit DeviceScope(int device);
    ~DeviceScope();
    DeviceScope(const DeviceScope&) = delete;
    DeviceScope& operator=(const DeviceScope&) = delete;

  private:
    int before_ = 0;
    bool changed_ = false;
};

// Does the stream capture a graph? TransferError where an error has invalidated the capture, until somebody ends it.
bool capturing(cudaStream_t stream);
// TransferError where it does; `why` says what cannot be in a graph.
void refuse_capture(cudaStream_t stream, const char* why);

// `work` enqueues on the stream. Where it throws, what it has enqueued so far has no event that anybody could wait for,
// so that is over before the error goes on.
template <typename Work>
void all_or_over(cudaStream_t stream, Work&& work) {
    try {
        work();
    } catch (...) {
        cudaStreamSynchronize(stream);
        cudaGetLastError();  // or the next launch would be blamed
        throw;
    }
}

class EventPool;

// A point in a stream. Copies share it; the handle goes back to its pool with the last copy. An empty one is over.
class Event {
  public:
    Event() = default;
    bool done() const;         // never blocks; TransferError where the work before it failed
    void synchronize() const;  // blocks the calling thread
    // Work given to `stream` from now on runs after this point. The host does not wait.
    void before(cudaStream_t stream) const;
    explicit operator bool() const noexcept { return handle_ != nullptr; }

  private:
    friend class EventPool;
    std::shared_ptr<CUevent_st> handle_;
};

// Events without timing, reused: making one costs more than recording it. Thread-safe.
class EventPool : public std::enable_shared_from_this<EventPool> {
  public:
    static std::shared_ptr<EventPool> make(int device);
    ~EventPool();
    EventPool(const EventPool&) = delete;
    EventPool& operator=(const EventPool&) = delete;
    // The point after everything given to `stream` so far. A pooled handle may be recorded again at once: who waits for
    // its former recording has that recording, not the handle.
    Event record(cudaStream_t stream);

  private:
    explicit EventPool(int device) : device_(device) {}
    const int device_;
    std::mutex mutex_;
    std::vector<cudaEvent_t> idle_;
};

class Stream {
  public:
    explicit Stream(int device);  // non-blocking
    ~Stream();
    Stream(const Stream&) = delete;
    Stream& operator=(const Stream&) = delete;
    cudaStream_t get() const noexcept { return stream_; }
    void synchronize() const;

  private:
    const int device_;
    cudaStream_t stream_ = nullptr;
};

// Page-locked host memory: what a copy engine reads without a detour, and without the host waiting.
class PinnedBuffer {
  public:
    // Every device can read it; `device` is the one whose context it belongs to. BudgetError.
    PinnedBuffer(std::size_t bytes, int device);
    ~PinnedBuffer();
    PinnedBuffer(const PinnedBuffer&) = delete;
    PinnedBuffer& operator=(const PinnedBuffer&) = delete;
    std::byte* data() const noexcept { return data_; }
    std::size_t bytes() const noexcept { return bytes_; }

  private:
    std::byte* data_ = nullptr;
    std::size_t bytes_;
};

}  // namespace emoe::cuda
