// Shared by the three parts of the fake runtime: streams, events, allocations, injected faults. Not for tests to
// include.
#pragma once

#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <mutex>
#include <random>

#include "cudart.hpp"

namespace emu {

inline int setting(const char* name, int otherwise) {
    const char* value = std::getenv(name);
    return value ? std::atoi(value) : otherwise;
}

// Sleeps until another thread changes the word. The system call is invisible to ThreadSanitizer, so waking orders
// nothing.
void park(std::atomic<std::uint32_t>& word, std::uint32_t seen);
void unpark(std::atomic<std::uint32_t>& word);

struct Node {
    std::function<void()> work;
    std::atomic<Node*> next{nullptr};
};

// One thread a stream. Appending makes one happens-before edge, from the caller to the worker, and none between
// callers.
class Stream {
  public:
    explicit Stream(int device);
    void push(std::function<void()> work);
    void stop();          // the worker ends after what was appended; nobody waits for it
    static void delay();  // on the worker of any stream: nothing, or a random while

    const int device;

  private:
    void run();

    Node* head_;  // the worker's
    std::atomic<Node*> tail_;
    std::atomic<std::uint32_t> pushes_{0};
    std::mt19937 random_;
    const unsigned longest_us_;
};

struct Capture;

// One recording of an event. Never freed: counting references would order threads that the program did not.
struct Recording {
    std::atomic<std::uint32_t> done{0};
    Recording* previous = nullptr;
    Capture* inside = nullptr;  // made while its stream captured: no point in time, but a place in a graph
    const Stream* on = nullptr;
    std::uint64_t calls = 0;
    void wait();
    void finish();
};
Recording* new_recording();

struct Event {
    int device;
    std::atomic<Recording*> recording{nullptr};
};

int current_device();
int devices();
Stream* live_stream(cudaStream_t stream);  // nullptr: destroyed or never made
bool injected(const char* function, cudaError_t* code);
cudaError_t returned(cudaError_t code);
unsigned copy_us();  // slow_copies()
// A host-to-device copy on this device's engine: runs `copy` when its turn has come.
void through_engine(int device, const void* target, std::size_t bytes, const std::function<void()>& copy);
void count_copy_begin();
void count_copy_end();
std::uint64_t pinned_bytes();
std::uint64_t device_bytes();

bool in_capture(const Stream* on);
// Appends the work to the stream, or to the graph that it captures.
cudaError_t give(Stream* on, std::function<void()> work);
// What captures have to say to an event's recording or a wait for it (null: never recorded). A stream that captures and
// one that waits for a captured event have nothing to run.
cudaError_t capture_record(Stream* on, Recording* recording);
cudaError_t capture_wait(Stream* on, const Recording* recording);
// An error, and the captures that forbid it invalidated, where this thread may not wait now, allocate or free.
cudaError_t may_wait(const Recording* recording);
cudaError_t may_wait(const Stream* stream);
cudaError_t may_wait_for_device(int device);
cudaError_t may_allocate();

}  // namespace emu

// First line of every runtime function: an injected fault is returned in its place.
#define EMU_ENTER(name)                                                          \
    do {                                                                         \
        cudaError_t emu_code = cudaSuccess;                                      \
        if (::emu::injected(#name, &emu_code)) return ::emu::returned(emu_code); \
    } while (false)
// Returns the error where there is one.
#define EMU_CHECK(check)                                               \
    do {                                                               \
        const cudaError_t emu_code = (check);                          \
        if (emu_code != cudaSuccess) return ::emu::returned(emu_code); \
    } while (false)
