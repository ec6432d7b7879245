#include "core/source_file.hpp"

#include <fcntl.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <system_error>
#include <utility>

#include "core/error.hpp"

namespace emoe {
namespace {

std::string said(int number) { return std::generic_category().message(number); }

bool more_descriptors() {
    rlimit limit{};
    if (::getrlimit(RLIMIT_NOFILE, &limit) != 0 || limit.rlim_cur >= limit.rlim_max) return false;
    limit.rlim_cur = limit.rlim_max;
    return ::setrlimit(RLIMIT_NOFILE, &limit) == 0;
}

// Once more after an interrupt, and after descriptors have run out if there can be more.
template <typename Open>
int retrying(Open&& open) {
    int fd = -1;
    do fd = open();
    while (fd < 0 && (errno == EINTR || (errno == EMFILE && more_descriptors())));
    return fd;
}

FileIdentity identity_of(const struct stat& info) {
    return {static_cast<std::uint64_t>(info.st_dev), static_cast<std::uint64_t>(info.st_ino),
            static_cast<std::int64_t>(info.st_size),
            static_cast<std::int64_t>(info.st_mtim.tv_sec) * 1'000'000'000 + info.st_mtim.tv_nsec};
}

constexpr std::int64_t kPlaces = 32;  // emoe/store/opened.py has the same
constexpr std::int64_t kSample = 256;

// Of places all over a file, by FNV-1a; those that cannot be read count as empty.
std::uint64_t sample_of(int fd, std::int64_t size) {
    std::uint64_t hash = 0xCBF29CE484222325U;
    unsigned char bytes[kSample];
    for (std::int64_t place = 0; place < kPlaces; ++place) {
        const ssize_t count =
            ::pread(fd, bytes, kSample, std::max<std::int64_t>(0, size - kSample) * place / (kPlaces - 1));
        for (ssize_t i = 0; i < count; ++i) hash = (hash ^ bytes[i]) * 0x100000001B3U;
    }
    return hash;
}

std::string difference(const FileIdentity& then, const FileIdentity& now) {
    std::string what = "it was written to";
    if (now.size != then.size) {
        what = "it had " + std::to_string(then.size) + " bytes, now " + std::to_string(now.size);
    } else if (now.device != then.device || now.inode != then.inode) {
        what = "another file is in its place";
    }
    return "changed since the model was loaded (" + what + "); load the model again";
}

}  // namespace

int open_for_reading(const std::string& path, int flags) {
    return retrying([&] { return ::open(path.c_str(), flags | O_RDONLY | O_CLOEXEC | O_NONBLOCK | O_NOCTTY); });
}

SourceFile::SourceFile(std::string path, std::optional<int> fd, std::optional<FileIdentity> identity)
    : path_(std::move(path)) {
    const auto refuse = [this](const std::string& message) {
        if (fd_ >= 0) ::close(fd_);
        throw Error(ErrorKind::kRead, message, path_, "", -1, -1);
    };
    fd_ = fd ? retrying([&] { return ::fcntl(*fd, F_DUPFD_CLOEXEC, 0); }) : open_for_reading(path_);
    struct stat info{};
    if (fd_ < 0 || ::fstat(fd_, &info) != 0) refuse("cannot open " + path_ + ": " + said(errno));
    if (!S_ISREG(info.st_mode)) refuse("cannot open " + path_ + ": it is no regular file");
    identity_ = identity_of(info);
    if (identity && *identity != identity_) refuse(path_ + " " + difference(*identity, identity_));
    sample_ = sample_of(fd_, identity_.size);
}

SourceFile::~SourceFile() { ::close(fd_); }

bool SourceFile::same_file(int fd) const noexcept {
    struct stat info{};
    return ::fstat(fd, &info) == 0 && identity_of(info).device == identity_.device &&
           identity_of(info).inode == identity_.inode;
}

std::string SourceFile::change(int fd) const {
    struct stat info{};
    if (::fstat(fd, &info) != 0) return "";  // a file system that does not answer has said so in the read
    const FileIdentity now = identity_of(info);
    return now == identity_ ? "" : difference(identity_, now);
}

std::shared_ptr<const SourceFile> SourceFile::successor() const {
    try {
        auto now = std::make_shared<const SourceFile>(path_);
        const FileIdentity& its = now->identity();
        const bool another = its.device != identity_.device || its.inode != identity_.inode;
        const bool alike = its.size == identity_.size && its.mtime_ns == identity_.mtime_ns && now->sample_ == sample_;
        return another && alike ? now : nullptr;
    } catch (const Error&) {
        return nullptr;
    }
}

}  // namespace emoe
