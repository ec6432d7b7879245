#include "io/file_reader.hpp"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <system_error>

#include "core/error.hpp"
#include "core/slab.hpp"

namespace emoe {

File::~File() { ::close(fd_); }

std::int64_t File::size() const noexcept {
    struct stat info{};
    return ::fstat(fd_, &info) == 0 ? static_cast<std::int64_t>(info.st_size) : -1;
}

namespace io {
namespace {

int open_retrying(const std::string& path, int flags) {
    int fd = -1;
    do fd = ::open(path.c_str(), flags | O_RDONLY | O_CLOEXEC);
    while (fd < 0 && errno == EINTR);
    return fd;
}

// Some file systems accept O_DIRECT when opening and refuse it when reading.
bool direct_read_works(int fd) {
    alignas(kPageBytes) std::byte page[kPageBytes];
    ssize_t got = -1;
    do got = ::pread(fd, page, sizeof page, 0);
    while (got < 0 && errno == EINTR);
    return got >= 0 || errno != EINVAL;
}

}  // namespace

std::string FileReader::note() const {
    const std::lock_guard lock(mutex_);
    return note_;
}

std::unique_ptr<File> FileReader::open(const std::string& path) {
    if (direct()) {
        const int fd = open_retrying(path, O_DIRECT);
        if (fd >= 0 && direct_read_works(fd)) return std::make_unique<File>(fd, path, kPageBytes);
        if (fd >= 0) ::close(fd);
        if (fd >= 0 || errno == EINVAL) {
            direct_.store(false, std::memory_order_relaxed);
            const std::lock_guard lock(mutex_);
            note_ += (note_.empty() ? "" : "; ") + std::string("the file system of ") + path +
                     " refuses O_DIRECT, reads go through the page cache";
        }
    }
    const int fd = open_retrying(path, 0);
    if (fd < 0) {
        throw Error(ErrorKind::kRead, "cannot open " + path + ": " + std::generic_category().message(errno), path, "",
                    -1, -1);
    }
    return std::make_unique<File>(fd, path, 1);
}

}  // namespace io
}  // namespace emoe
