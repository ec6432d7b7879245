#include "io/file_reader.hpp"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <system_error>

#include "core/slab.hpp"

namespace emoe {

File::~File() {
    if (fd_ >= 0 && fd_ != source_->fd()) ::close(fd_);
}

std::int64_t File::size() const noexcept {
    struct stat info{};
    return ::fstat(fd_, &info) == 0 ? static_cast<std::int64_t>(info.st_size) : -1;
}

namespace io {
namespace {

// The source's own inode once more, whatever its path leads to by now.
int open_again(const SourceFile& source, int flags) {
    int fd = open_for_reading("/proc/self/fd/" + std::to_string(source.fd()), flags);
    if (fd < 0 && (errno == ENOENT || errno == ENOTDIR)) fd = open_for_reading(source.path(), flags);  // no /proc
    if (fd < 0 || source.same_file(fd)) return fd;
    ::close(fd);
    errno = ESTALE;
    return -1;
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

std::unique_ptr<File> FileReader::open(std::shared_ptr<const SourceFile> source) {
    if (!direct()) return std::make_unique<File>(source->fd(), source, 1);
    const int fd = open_again(*source, O_DIRECT);
    if (fd >= 0 && direct_read_works(fd)) return std::make_unique<File>(fd, std::move(source), kPageBytes);
    const int why = fd >= 0 ? EINVAL : errno;
    if (fd >= 0) ::close(fd);
    const std::lock_guard lock(mutex_);
    if (!note_.empty()) note_ += "; ";
    if (why == EINVAL) {
        direct_.store(false, std::memory_order_relaxed);
        note_ += "the file system of " + source->path() + " refuses O_DIRECT, reads go through the page cache";
    } else {
        note_ += source->path() + " cannot be opened again for O_DIRECT (" + std::generic_category().message(why) +
                 "), it is read through the page cache";
    }
    return std::make_unique<File>(source->fd(), source, 1);
}

}  // namespace io
}  // namespace emoe
