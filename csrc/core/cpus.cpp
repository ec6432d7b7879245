#include "core/cpus.hpp"

#include <sched.h>
#include <strings.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <string>
#include <thread>
#include <vector>

namespace emoe {
namespace {

namespace fs = std::filesystem;

// The words of a small file; none where it cannot be read.
std::vector<std::string> words_of(const fs::path& file) {
    std::ifstream stream(file);
    std::vector<std::string> words;
    for (std::string word; stream >> word;) words.push_back(word);
    return words;
}

double positive(const std::string& text) {
    try {
        return std::max(0.0, std::stod(text));  // "max" and -1: no quota
    } catch (const std::exception&) {
        return 0.0;
    }
}

// CPUs of one cgroup, 0 without a quota.
double quota_of(const fs::path& group, bool version2) {
    const auto quota = words_of(group / (version2 ? "cpu.max" : "cpu.cfs_quota_us"));  // "max 100000"; -1
    const auto period = version2 ? quota : words_of(group / "cpu.cfs_period_us");
    if (quota.empty() || period.empty() || positive(period.back()) == 0.0) return 0.0;
    return positive(quota.front()) / positive(period.back());
}

// CPUs that the calling thread may run on.
class CpuSet {
  public:
    static CpuSet all() {
        CpuSet set;
        std::memset(set.get(), 0xFF, set.bytes());
        return set;
    }
    static CpuSet own() {
        CpuSet set;
        if (::sched_getaffinity(0, set.bytes(), set.get()) != 0) set.masks_.assign(set.masks_.size(), cpu_set_t{});
        return set;
    }
    int count() const { return CPU_COUNT_S(bytes(), get()); }
    CpuSet without(const CpuSet& others) const {
        CpuSet set;
        CPU_XOR_S(bytes(), set.get(), get(), others.get());
        CPU_AND_S(bytes(), set.get(), set.get(), get());
        return set;
    }
    void set() const { ::sched_setaffinity(0, bytes(), get()); }  // what the cpuset lacks does not count

  private:
    // 8192 CPUs; the kernel refuses masks shorter than its own.
    CpuSet() : masks_(8) {}
    cpu_set_t* get() { return masks_.data(); }
    const cpu_set_t* get() const { return masks_.data(); }
    std::size_t bytes() const { return masks_.size() * sizeof(cpu_set_t); }

    std::vector<cpu_set_t> masks_;
};

bool openmp_binds() {
    const char* const bind = std::getenv("OMP_PROC_BIND");
    if (bind != nullptr) return ::strcasecmp(bind, "false") != 0;
    return std::getenv("OMP_PLACES") != nullptr || std::getenv("GOMP_CPU_AFFINITY") != nullptr;
}

}  // namespace

double cpu_quota(const fs::path& own, const fs::path& root) {
    double least = 0.0;
    std::ifstream stream(own);
    for (std::string line; std::getline(stream, line);) {  // 0::/path, or 1:cpu,cpuacct:/path
        const std::size_t first = line.find(':');
        const std::size_t second = line.find(':', first + 1);
        if (first == std::string::npos || second == std::string::npos) continue;
        std::string controllers = line.substr(first, second - first).append(":");
        std::replace(controllers.begin(), controllers.end(), ',', ':');
        const bool version2 = controllers == "::";
        if (!version2 && controllers.find(":cpu:") == std::string::npos) continue;
        const fs::path top = version2 ? root : root / "cpu";
        fs::path group = top;
        const fs::path below = fs::path(line.substr(second + 1)).relative_path();
        auto next = below.begin();
        for (;;) {
            const double quota = quota_of(group, version2);
            if (quota > 0.0) least = least == 0.0 ? quota : std::min(least, quota);
            if (next == below.end()) break;
            group /= *next++;
        }
    }
    return least;
}

int usable_cpus() {
    int cpus = 0;
    if (openmp_binds()) {
        std::thread([&] {
            CpuSet::all().set();
            cpus = CpuSet::own().count();
        }).join();
    } else {
        cpus = CpuSet::own().count();
    }
    if (cpus == 0) cpus = static_cast<int>(std::thread::hardware_concurrency());
    const double quota = cpu_quota("/proc/self/cgroup", "/sys/fs/cgroup");
    return std::max(1, quota == 0.0 ? cpus : std::min(cpus, static_cast<int>(std::lround(quota))));
}

void leave_binding() {
    if (!openmp_binds()) return;
    constexpr int kCore = 2;  // its CPUs, at most
    const CpuSet bound = CpuSet::own();
    CpuSet::all().set();
    const CpuSet others = CpuSet::own().without(bound);
    if (bound.count() <= kCore && others.count() > 0) others.set();
}

}  // namespace emoe
