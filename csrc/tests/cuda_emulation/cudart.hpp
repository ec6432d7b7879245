// What the fake CUDA runtime (cudart.cpp, cudart_memory.cpp, cudart_graph.cpp) offers to tests and to the kernel
// emulation beyond NVIDIA's own prototypes. Tests only: it models ordering and ranges, not speed.
//
// Environment: EMU_SEED (delays and orders), EMU_DELAY_US (largest delay before an operation, 0: none), EMU_DEVICES.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>
#include <functional>
#include <vector>

namespace emu {

// Appends work to a stream; it runs on the stream's own thread, after what was appended before. Null is the default
// stream. Waiting for it or ordering after it goes through events, as with real kernels.
void enqueue(cudaStream_t stream, std::function<void()> work);

void note_error(cudaError_t code);  // what cudaGetLastError returns next on this thread
unsigned next_seed();               // a new seed each call, a function of EMU_SEED
[[noreturn]] void die(const char* message);

// Does [p, p + bytes) lie inside one live allocation of that kind?
bool is_device(const void* p, std::size_t bytes);
bool is_pinned(const void* p, std::size_t bytes);

// The nth call (from 1) of the named runtime function from now on returns `code`; nullptr takes all faults back.
void fail(const char* function, int nth, cudaError_t code);
// cudaGetDeviceCount answers this (35: no driver, 100: no device); cudaSuccess: normal.
void pretend_device_error(cudaError_t code);

// A host-to-device copy issued from now on takes this much longer; 0: no longer. So that what does not wait is seen.
void slow_copies(unsigned us);

// From now on host-to-device copies of a device go through one engine, in the order in which they reach the heads of
// their streams, whatever the streams are, and each takes this long for its bytes; 0: no longer.
void copy_engine(unsigned us_per_kib);
void hold_engines(bool hold);             // whose turn has come waits, or no longer
unsigned waiting_for_engine(int device);  // copies at the heads of their streams that have not begun

// What ran, in the order in which it began. Work of enqueue() is a kernel.
struct Span {
    bool copy;
    const void* target;  // of a copy
    std::uint64_t bytes;
    double begin, end;  // seconds
};
void keep_timeline(bool keep);  // from now on, or no longer; forgets what was kept
std::vector<Span> timeline();

// Device and pinned memory that was allocated while this device was current.
std::uint64_t bytes_of_device(int device);

struct Counters {
    std::uint64_t copies;            // cudaMemcpyAsync issued
    std::uint64_t stream_waits;      // cudaStreamWaitEvent issued
    std::uint64_t events_alive;      // created and not destroyed
    std::uint64_t streams_alive;     // created and not destroyed
    std::uint64_t copies_in_flight;  // host-to-device copies issued and not finished
    std::uint64_t most_in_flight;    // highest value of the above since reset_counters()
    std::uint64_t device_bytes;      // allocated now
    std::uint64_t pinned_bytes;      // allocated now
};
Counters counters();
void reset_counters();  // copies, stream_waits, most_in_flight

// Names the emulator's own bookkeeping, which ThreadSanitizer must not see.
struct Quiet {
    Quiet();
    ~Quiet();
    Quiet(const Quiet&) = delete;
    Quiet& operator=(const Quiet&) = delete;
};

}  // namespace emu
