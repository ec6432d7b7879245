// How many CPUs this process may use.
#pragma once

#include <filesystem>

namespace emoe {

// CPUs of the affinity mask, or fewer where a cgroup's CPU quota gives fewer (to the nearest whole); at least 1.
int usable_cpus();

// Where OpenMP was told to bind threads (OMP_PROC_BIND, OMP_PLACES, GOMP_CPU_AFFINITY), the thread that loaded it has
// one place, and so has every thread that it makes. This gives the calling thread the CPUs of the process's cpuset
// then, without that place where it is one core.
void leave_binding();

// The least CPU quota of the cgroups that `own` (/proc/self/cgroup) names below `root` (/sys/fs/cgroup) and of those
// above them, in CPUs; 0: none. Versions 1 and 2.
double cpu_quota(const std::filesystem::path& own, const std::filesystem::path& root);

}  // namespace emoe
