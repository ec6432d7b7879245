// Shared by the two halves of the fake runtime: streams, events, allocations, injected faults. Not for tests to
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
    void stop();   // the worker ends after what was appended; nobody waits for it
    void delay();  // on the worker: nothing, or a random while

    const int device;

  private:
    void run();

    Node* head_;  // the worker's
    std::atomic<Node*> tail_;
    std::atomic<std::uint32_t> pushes_{0};
    std::mt19937 random_;
    const unsigned longest_us_;
};

// One recording of an event. Never freed: counting references would order threads that the program did not.
struct Recording {
    std::atomic<std::uint32_t> done{0};
    Recording* previous = nullptr;
    void wait();
    void finish();
};

struct Event {
    int device;
    std::atomic<Recording*> recording{nullptr};
};

int current_device();
int devices();
Stream* live_stream(cudaStream_t stream);  // nullptr: destroyed or never made
bool injected(const char* function, cudaError_t* code);
cudaError_t returned(cudaError_t code);
void count_copy_begin();
void count_copy_end();
std::uint64_t pinned_bytes();
std::uint64_t device_bytes();

}  // namespace emu

// First line of every runtime function: an injected fault is returned in its place.
#define EMU_ENTER(name)                                                          \
    do {                                                                         \
        cudaError_t emu_code = cudaSuccess;                                      \
        if (::emu::injected(#name, &emu_code)) return ::emu::returned(emu_code); \
    } while (false)
