// Loops on the kernels' own threads: every index once, whoever is late; with threads delayed at random where they
// claim, sleep, wake and join.
#include "core/parallel.hpp"

#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <filesystem>
#include <fstream>
#include <functional>
#include <mutex>
#include <random>
#include <set>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "core/cpus.hpp"
#include "core/error.hpp"
#include "tests/check.hpp"

using namespace emoe;
using detail::Step;
namespace fs = std::filesystem;

namespace {

using std::chrono::microseconds;

// As many threads and this hook, until the end of a test.
class Setting {
  public:
    explicit Setting(int team, detail::StepHook hook = nullptr) : before_(threads()) {
        set_threads(team);
        detail::set_step_hook(hook);
    }
    ~Setting() {
        detail::set_step_hook(nullptr);
        set_threads(before_);
    }

  private:
    const int before_;
};

// Mostly nothing, sometimes another thread's turn, seldom a sleep, which is longer than threads spin.
void delay(Step) {
    thread_local std::minstd_rand random(
        static_cast<unsigned>(std::hash<std::thread::id>{}(std::this_thread::get_id())));
    const auto drawn = random() % 64;
    if (drawn == 0) std::this_thread::sleep_for(microseconds(random() % 300));
    if (drawn > 0 && drawn < 16) std::this_thread::yield();
}

// Whether a loop of n calls fn for every index once. The counts are no atomics: what ran is visible to the caller.
bool each_once(std::int64_t n) {
    std::vector<int> count(static_cast<std::size_t>(n));
    parallel_for(n, [&](std::int64_t i) { ++count[static_cast<std::size_t>(i)]; });
    return std::all_of(count.begin(), count.end(), [](int each) { return each == 1; });
}

std::atomic<bool> gate{true};
std::atomic<int> waiting{0};
std::thread::id caller;

// Workers wait where they woke up.
void hold_woken(Step step) {
    if (step != Step::kWoken) return;
    ++waiting;
    while (!gate.load()) std::this_thread::sleep_for(microseconds(50));
    --waiting;
}

// Workers wait with a chunk in their hands until the caller wants to join, and then some.
std::atomic<bool> joins{false};
void hold_claimed(Step step) {
    if (step == Step::kJoins) joins.store(true);
    if (step != Step::kClaimed || std::this_thread::get_id() == caller) return;
    while (!joins.load()) std::this_thread::sleep_for(microseconds(50));
    std::this_thread::sleep_for(microseconds(500));  // the caller sleeps by now
}

// ThreadSanitizer cannot follow threads that a child of fork() makes.
#if defined(__SANITIZE_THREAD__)
constexpr bool kChildrenHaveThreads = false;
#else
constexpr bool kChildrenHaveThreads = true;
#endif

// What `body` returns in a child process.
int in_child(const std::function<int()>& body) {
    const pid_t child = ::fork();
    if (child == 0) {
        int result = 99;
        try {
            result = body();
        } catch (...) {
        }
        ::_exit(result);
    }
    int status = 0;
    ::waitpid(child, &status, 0);
    return WIFEXITED(status) ? WEXITSTATUS(status) : -1;
}

}  // namespace

// The first test, since no worker may be there before it is held.
TEST("a worker that has not begun is not waited for, and finds nothing of the loop afterwards") {
    const Setting setting(3, hold_woken);
    gate = false;
    const auto self = std::this_thread::get_id();
    for (int round = 0; round < 50 || waiting.load() < 2; ++round) {
        std::vector<std::thread::id> by(32);
        parallel_for(32, [&](std::int64_t i) { by[static_cast<std::size_t>(i)] = std::this_thread::get_id(); });
        CHECK(std::all_of(by.begin(), by.end(), [&](auto each) { return each == self; }));
    }
    gate = true;  // they arrive between loops, and in the middle of some
    for (int round = 0; round < 50 || waiting.load() > 0; ++round) CHECK(each_once(32));
}

TEST("a loop calls every index once, whatever its length and the number of threads") {
    for (const int team : {1, 2, 3, 7, 70}) {
        const Setting setting(team, delay);
        for (const std::int64_t n : {0, 1, 2, 3, 6, 64, 1000, 100000}) CHECK(each_once(n));
    }
}

TEST("many short loops in a row meet workers that spin, fall asleep and come late") {
    for (const int team : {2, 4}) {
        const Setting setting(team, delay);
        for (int round = 0; round < 20000; ++round) CHECK(each_once(1 + round % 9));
    }
}

TEST("an index that takes long holds up no other") {
    const Setting setting(2);
    constexpr std::int64_t kIndices = 64;
    for (const std::int64_t slow : {std::int64_t{0}, kIndices / 2}) {  // the first of each thread's part
        std::atomic<std::int64_t> others{0};
        parallel_for(kIndices, [&](std::int64_t i) {
            if (i != slow) {
                ++others;
                return;
            }
            while (others.load() < kIndices - 1) std::this_thread::yield();
        });
        CHECK_EQ(others.load(), kIndices - 1);
    }
}

TEST("a caller that sleeps until the last chunk is done is woken") {
    const Setting setting(2, hold_claimed);
    caller = std::this_thread::get_id();
    for (int round = 0; round < 50; ++round) {
        joins = false;
        CHECK(each_once(20));
    }
}

TEST("a loop inside a loop runs in place") {
    const Setting setting(4, delay);
    std::atomic<int> elsewhere{0};
    std::atomic<int> calls{0};
    parallel_for(40, [&](std::int64_t) {
        const auto self = std::this_thread::get_id();
        parallel_for(10, [&](std::int64_t) {
            ++calls;
            if (std::this_thread::get_id() != self) ++elsewhere;
        });
    });
    CHECK_EQ(calls.load(), 400);
    CHECK_EQ(elsewhere.load(), 0);
}

TEST("the first exception comes out, what had not begun is skipped, and the next loop is whole") {
    for (const int team : {1, 2, 5}) {
        const Setting setting(team, delay);
        for (int round = 0; round < 200; ++round) {
            std::atomic<int> ran{0};
            std::string what;
            try {
                parallel_for(100000, [&](std::int64_t i) {
                    ++ran;
                    if (i % 7 == 3) throw std::runtime_error("index " + std::to_string(i));
                });
            } catch (const std::runtime_error& error) {
                what = error.what();
            }
            CHECK_EQ(what.substr(0, 6), "index ");
            CHECK(ran.load() < 100000);
            CHECK(each_once(50));
        }
    }
}

TEST("several callers at once, with exceptions and another number of threads at any moment") {
    const Setting setting(3, delay);
    std::atomic<bool> stop{false};
    std::atomic<int> wrong{0};
    std::thread changing([&] {
        for (int n = 1; !stop.load(); n = n % 6 + 1) {
            set_threads(n);
            std::this_thread::sleep_for(microseconds(100));
        }
    });
    std::vector<std::thread> callers;
    for (int c = 0; c < 4; ++c) {
        callers.emplace_back([&, c] {
            for (int round = 0; round < 2000; ++round) {
                if (!each_once(1 + (round * 7 + c) % 200)) ++wrong;
                if (round % 5 != 0) continue;
                try {
                    parallel_for(64, [&](std::int64_t i) {
                        if (i == round % 64) throw std::runtime_error("on purpose");
                    });
                    ++wrong;
                } catch (const std::runtime_error&) {
                }
            }
        });
    }
    for (std::thread& each : callers) each.join();
    stop = true;
    changing.join();
    CHECK_EQ(wrong.load(), 0);
}

TEST("a caller that begins while another's loop runs is not held up by it") {
    const Setting setting(2);
    std::atomic<bool> running{false};
    std::atomic<bool> over{false};
    std::thread first([&] {
        parallel_for(2, [&](std::int64_t) {
            running = true;
            while (!over.load()) std::this_thread::yield();
        });
    });
    while (!running.load()) std::this_thread::yield();
    const bool whole = each_once(100);
    over = true;
    first.join();
    CHECK(whole);
}

TEST("a child of fork has threads of its own, its child too, and the parent goes on") {
    if (!kChildrenHaveThreads) return;
    const Setting setting(3, delay);
    CHECK(each_once(100));
    const auto loops = [] {
        std::mutex mutex;
        std::set<std::thread::id> seen;
        for (int round = 0; round < 10000 && seen.size() < 2; ++round) {
            if (!each_once(50)) return 1;
            parallel_for(8, [&](std::int64_t) {
                const std::lock_guard lock(mutex);
                seen.insert(std::this_thread::get_id());
            });
        }
        return seen.size() < 2 ? 2 : 0;
    };
    CHECK_EQ(in_child([&] {
                 const int own = loops();
                 return own != 0 ? own : in_child(loops) * 10;
             }),
             0);
    CHECK(each_once(100));
}

TEST("forks at any moment of another thread's loops hang nobody") {
    const Setting setting(3, delay);
    std::atomic<bool> stop{false};
    std::atomic<bool> wrong{false};
    std::thread busy([&] {
        while (!stop.load()) {
            if (!each_once(30)) wrong = true;
        }
    });
    int failed = 0;
    for (int round = 0; round < 50; ++round)
        failed += in_child([] { return !kChildrenHaveThreads || each_once(100) ? 0 : 1; }) != 0;
    stop = true;
    busy.join();
    CHECK_EQ(failed, 0);
    CHECK(!wrong.load());
}

TEST("a number of threads that makes no sense is refused") {
    CHECK_ERROR(ErrorKind::kConfig, set_threads(0));
    CHECK_ERROR(ErrorKind::kConfig, set_threads(-3));
    CHECK_ERROR(ErrorKind::kConfig, set_threads(1025));
}

TEST("the least CPU quota of a cgroup and those above it counts, in both versions") {
    const fs::path root = fs::temp_directory_path() / ("emoe-cpus-" + std::to_string(::getpid()));
    struct Removing {
        const fs::path& folder;
        ~Removing() { fs::remove_all(folder); }
    } const removing{root};
    const auto write = [&](const fs::path& file, const std::string& text) {
        fs::create_directories((root / file).parent_path());
        std::ofstream(root / file) << text;
    };
    const auto quota = [&](const std::string& own) {
        write("own", own);
        return cpu_quota(root / "own", root);
    };
    write("a/cpu.max", "150000 100000\n");
    write("a/b/cpu.max", "max 100000\n");
    write("a/b/c/cpu.max", "400000 100000\n");
    write("cpu/x/cpu.cfs_quota_us", "50000\n");
    write("cpu/x/cpu.cfs_period_us", "100000\n");
    write("cpu/x/y/cpu.cfs_quota_us", "-1\n");
    write("cpu/x/y/cpu.cfs_period_us", "100000\n");
    CHECK_EQ(quota("0::/a/b/c\n"), 1.5);
    CHECK_EQ(quota("0::/a\n"), 1.5);
    CHECK_EQ(quota("0::/elsewhere\n"), 0.0);
    CHECK_EQ(quota("4:cpuset:/x\n3:cpu,cpuacct:/x/y\n0::/\n"), 0.5);
    CHECK_EQ(quota("3:cpuacct,cpu:/\n"), 0.0);
    CHECK_EQ(quota("no cgroup\n"), 0.0);
    CHECK_EQ(cpu_quota(root / "missing", root), 0.0);
    CHECK(usable_cpus() >= 1);
}

EMOE_TEST_MAIN
