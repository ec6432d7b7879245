#include "core/parallel.hpp"

#include <linux/futex.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <charconv>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <mutex>
#include <string>
#include <system_error>
#include <thread>

#include "core/cpus.hpp"
#include "core/error.hpp"
#include "core/fork.hpp"

namespace emoe {
namespace {

using Clock = std::chrono::steady_clock;
using std::chrono::microseconds;
using std::chrono::milliseconds;

constexpr int kMostThreads = 1024;
constexpr int kMostParts = 64;
constexpr std::int64_t kChunksOfThread = 256;  // where a loop has more indices than this, a chunk is several of them

// What lies between two loops of a decode step is Python, and takes longer than 100 us. 100 and 600 us in turn, two
// cores of an AMD EPYC (`benchmarks/decode.py --part busy --rounds 3`): quiet 16.6, 16.8 and 15.2, 15.9 ms a token,
// beside a busy process 23.1, 22.7 and 22.5, 21.3.
constexpr auto kSpin = microseconds(600);     // a worker without work looks for some this long, then sleeps
constexpr auto kJoinSpin = microseconds(50);  // a caller waits this long for chunks of others, then sleeps
constexpr auto kCrowded = milliseconds(50);  // nobody spins for this long after a worker lost its CPU to another thread

std::atomic<int> chosen_threads{0};  // 0: the default
std::atomic<detail::StepHook> step_hook{nullptr};

void at(detail::Step step) {
    if (const detail::StepHook hook = step_hook.load(std::memory_order_relaxed)) hook(step);
}

void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#else
    std::this_thread::yield();
#endif
}

// Sleeps while `word` is `value`, or less long.
void sleep_while(const std::atomic<std::uint32_t>& word, std::uint32_t value) {
    ::syscall(SYS_futex, &word, FUTEX_WAIT_PRIVATE, value, nullptr, nullptr, 0);
}

void wake(const std::atomic<std::uint32_t>& word, int sleepers) {
    ::syscall(SYS_futex, &word, FUTEX_WAKE_PRIVATE, sleepers, nullptr, nullptr, 0);
}

// How often another thread was run in place of this one, which could have gone on.
long preemptions() {
    rusage usage{};
    ::getrusage(RUSAGE_THREAD, &usage);
    return usage.ru_nivcsw;
}

// True as soon as `ready()`, false after `time`.
template <typename Ready>
bool spin(Clock::duration time, Ready&& ready) {
    if (ready()) return true;
    const auto until = Clock::now() + time;
    do {
        for (int k = 0; k < 32; ++k) {
            pause();
            if (ready()) return true;
        }
    } while (Clock::now() < until);
    return false;
}

// A loop, on its caller's stack.
class Loop {
  public:
    Loop(std::int64_t n, std::int64_t grain, detail::Body body, void* self)
        : n_(n), grain_(grain), body_(body), self_(self) {}
    std::int64_t chunks() const { return (n_ + grain_ - 1) / grain_; }
    void run(std::int64_t chunk) noexcept {
        if (failed_.load(std::memory_order_relaxed)) return;
        try {
            body_(self_, chunk * grain_, std::min(n_, (chunk + 1) * grain_));
        } catch (...) {
            const std::lock_guard lock(mutex_);
            if (!error_) error_ = std::current_exception();
            failed_.store(true, std::memory_order_relaxed);
        }
    }
    void rethrow() const {
        if (error_) std::rethrow_exception(error_);
    }

  private:
    const std::int64_t n_, grain_;
    const detail::Body body_;
    void* const self_;
    std::atomic<bool> failed_{false};
    std::mutex mutex_;
    std::exception_ptr error_;
};

// Threads that help with one loop at a time.
//
// A loop's chunks lie in parts, one for each thread; who takes a seat begins with its own part, in ascending order, and
// goes on with what others left. Whoever holds a chunk that is not in `pending_` as done keeps the loop, and so what
// `loop_` and Part::end say, from ending; nobody else looks at those. So a worker that has claimed nothing is not
// waited for, whatever it is about to do, and one that comes late finds nothing to claim, or chunks of the next loop.
class Pool {
  public:
    explicit Pool(Pool* before) : before_(before) {}
    bool of_this_process() const { return birth_ == fork_generation(); }
    // One caller at a time.
    bool enter() { return !busy_.exchange(true, std::memory_order_acquire); }
    void leave() { busy_.store(false, std::memory_order_release); }

    void run(std::int64_t n, int team, detail::Body body, void* self) {
        start(team - 1);
        Loop loop(n, std::max<std::int64_t>(1, n / (team * kChunksOfThread)), body, self);
        open(loop, team);
        const std::uint32_t own = take_part(0);
        at(detail::Step::kJoins);
        if (pending_.fetch_sub(own, std::memory_order_acq_rel) != own) join();
        loop.rethrow();
    }

  private:
    struct alignas(64) Part {
        std::atomic<std::int64_t> left{0};  // chunks to claim; 0 or less: none
        std::int64_t end = 0;               // the chunk after its last; for who holds a chunk
    };

    void start(int workers) {
        for (; started_ < workers; ++started_) {
            try {
                std::thread([this] { work(); }).detach();  // for ever: like the pool, which is never destroyed
            } catch (const std::system_error& error) {
                throw Error(ErrorKind::kConfig, "thread " + std::to_string(started_ + 2) + " of the kernels' " +
                                                    std::to_string(workers + 1) + " cannot be made (" + error.what() +
                                                    "); set EMOE_THREADS to fewer");
            }
        }
    }

    void open(Loop& loop, int team) {
        const std::int64_t chunks = loop.chunks();
        const int parts = std::min(team, kMostParts);
        loop_ = &loop;
        pending_.store(static_cast<std::uint32_t>(chunks), std::memory_order_relaxed);
        parts_.store(parts, std::memory_order_relaxed);
        seats_.store(team - 1, std::memory_order_relaxed);
        for (int p = 0; p < parts; ++p) {
            part_[p].end = chunks * (p + 1) / parts;
            part_[p].left.store(part_[p].end - chunks * p / parts, std::memory_order_release);
        }
        epoch_.fetch_add(1, std::memory_order_seq_cst);
        at(detail::Step::kOpened);
        const int asleep = sleepers_.load(std::memory_order_seq_cst);
        const int wanted = team - 1 - (started_ - asleep);  // those awake see it by themselves
        if (asleep > 0 && wanted > 0) wake(epoch_, std::min(asleep, wanted));
    }

    // A chunk, or -1.
    static std::int64_t claim(Part& part) {
        if (part.left.load(std::memory_order_relaxed) <= 0) return -1;
        const std::int64_t left = part.left.fetch_sub(1, std::memory_order_acquire);
        return left <= 0 ? -1 : part.end - left;
    }

    // The number of chunks that were done; they are still to be taken from pending_.
    std::uint32_t take_part(int seat) {
        std::uint32_t done = 0;
        const int parts = parts_.load(std::memory_order_relaxed);
        for (int p = 0; p < parts; ++p) {
            Part& part = part_[static_cast<std::size_t>((seat + p) % parts)];
            for (std::int64_t chunk = claim(part); chunk >= 0; chunk = claim(part)) {
                at(detail::Step::kClaimed);
                loop_->run(chunk);
                ++done;
            }
        }
        return done;
    }

    void work() {
        leave_binding();
        std::uint32_t seen = 0;
        long known = preemptions();
        for (;;) {
            const auto opened = [&] { return epoch_.load(std::memory_order_acquire) != seen; };
            if (const long now = preemptions(); now != known) {
                known = now;
                crowded_until_.store((Clock::now() + kCrowded).time_since_epoch().count(), std::memory_order_relaxed);
            }
            while (!spin(unless_crowded(kSpin), opened)) {
                at(detail::Step::kSleeps);
                sleepers_.fetch_add(1, std::memory_order_seq_cst);
                sleep_while(epoch_, seen);  // returns at once where a loop was opened meanwhile
                sleepers_.fetch_sub(1, std::memory_order_seq_cst);
            }
            seen = epoch_.load(std::memory_order_acquire);
            at(detail::Step::kWoken);
            const int seat = seats_.fetch_sub(1, std::memory_order_relaxed);
            if (seat <= 0) continue;
            const std::uint32_t done = take_part(seat);
            if (done == 0) continue;
            at(detail::Step::kDone);
            if (pending_.fetch_sub(done, std::memory_order_seq_cst) == done &&
                caller_sleeps_.load(std::memory_order_seq_cst)) {
                wake(pending_, 1);
            }
        }
    }

    // How long to spin: where threads compete for CPUs, spinning takes from those that work.
    Clock::duration unless_crowded(Clock::duration time) const {
        const bool crowded = Clock::now().time_since_epoch().count() < crowded_until_.load(std::memory_order_relaxed);
        return crowded ? Clock::duration::zero() : time;
    }

    // Until chunks that workers hold are done.
    void join() {
        const auto over = [&] { return pending_.load(std::memory_order_acquire) == 0; };
        if (spin(unless_crowded(kJoinSpin), over)) return;
        caller_sleeps_.store(true, std::memory_order_seq_cst);
        for (;;) {
            const std::uint32_t pending = pending_.load(std::memory_order_seq_cst);
            if (pending == 0) break;
            sleep_while(pending_, pending);
        }
        caller_sleeps_.store(false, std::memory_order_relaxed);
    }

    [[maybe_unused]] Pool* const
        before_;  // of the process that this one was forked from: without threads, but not lost
    const std::uint64_t birth_ = fork_generation();
    std::atomic<bool> busy_{false};
    int started_ = 0;       // workers; for the caller that entered
    Loop* loop_ = nullptr;  // for who holds a chunk
    std::array<Part, kMostParts> part_;
    alignas(64) std::atomic<std::uint32_t> epoch_{0};  // of loops that were opened
    std::atomic<int> seats_{0};                        // for workers, in the loop that is open
    std::atomic<int> parts_{1};
    alignas(64) std::atomic<std::uint32_t> pending_{0};  // chunks that are not done, as far as was said
    std::atomic<bool> caller_sleeps_{false};
    alignas(64) std::atomic<int> sleepers_{0};
    std::atomic<Clock::rep> crowded_until_{0};
};

std::atomic<Pool*> current{nullptr};

Pool& pool() {
    for (;;) {
        Pool* known = current.load(std::memory_order_acquire);
        if (known != nullptr && known->of_this_process()) return *known;
        auto made = std::make_unique<Pool>(known);
        if (current.compare_exchange_strong(known, made.get(), std::memory_order_acq_rel)) return *made.release();
    }
}

int checked(std::int64_t n, const std::string& what) {
    if (n < 1) throw Error(ErrorKind::kConfig, what + ": at least 1 thread is needed");
    if (n > kMostThreads) {
        throw Error(ErrorKind::kConfig, what + ": at most " + std::to_string(kMostThreads) + " threads are possible");
    }
    return static_cast<int>(n);
}

int default_threads() {
    if (const char* text = std::getenv("EMOE_THREADS"); text != nullptr && *text != '\0') {
        std::int64_t n = 0;
        const char* const end = text + std::strlen(text);
        const auto [stop, error] = std::from_chars(text, end, n);
        const std::string what = "EMOE_THREADS=" + std::string(text);
        if (stop != end || error == std::errc::invalid_argument) {
            throw Error(ErrorKind::kConfig, what + " is not a whole number from 1 to " + std::to_string(kMostThreads));
        }
        return checked(error == std::errc() ? n : kMostThreads + 1, what);
    }
    if (const char* text = std::getenv("OMP_NUM_THREADS")) {  // "4", "4,2": of the outermost loop
        const int n = std::atoi(text);
        if (n >= 1) return std::min(n, kMostThreads);
    }
    return std::min(usable_cpus(), kMostThreads);
}

}  // namespace

int threads() {
    if (const int chosen = chosen_threads.load(std::memory_order_relaxed); chosen > 0) return chosen;
    static std::atomic<int> found{0};  // no lock: a fork could leave it taken
    int known = found.load(std::memory_order_relaxed);
    if (known == 0) found.store(known = default_threads(), std::memory_order_relaxed);
    return known;
}

void set_threads(int n) {
    chosen_threads.store(checked(n, "set_threads(" + std::to_string(n) + ")"), std::memory_order_relaxed);
}

namespace detail {

void set_step_hook(StepHook hook) noexcept { step_hook.store(hook, std::memory_order_relaxed); }

void run_loop(std::int64_t n, Body body, void* self) {
    if (n <= 0) return;
    const int team = static_cast<int>(std::min<std::int64_t>(threads(), n));
    if (team <= 1) return body(self, 0, n);
    Pool& all = pool();
    if (!all.enter()) return body(self, 0, n);
    struct Leaving {
        Pool& left;
        ~Leaving() { left.leave(); }
    } const leaving{all};
    all.run(n, team, body, self);
}

}  // namespace detail
}  // namespace emoe
