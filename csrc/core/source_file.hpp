// A file that records lie in: a descriptor that is open from when the file was added until nobody needs it, and what
// told the file from any other, and from itself once written to. Reads nothing but a sample.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>

namespace emoe {

// Not the time of the last status change: a link or a permission alters no byte.
struct FileIdentity {
    std::uint64_t device = 0;
    std::uint64_t inode = 0;
    std::int64_t size = 0;
    std::int64_t mtime_ns = 0;
    bool operator==(const FileIdentity&) const = default;
};

// Opens without ever blocking; where descriptors have run out, with as many as the hard limit allows. -1: see errno.
int open_for_reading(const std::string& path, int flags = 0);

class SourceFile {
  public:
    // Keeps a duplicate of `fd`, or opens `path`. ReadError where that cannot be done, where it is no regular file, and
    // where it is not the file that `identity` tells of.
    explicit SourceFile(std::string path, std::optional<int> fd = {}, std::optional<FileIdentity> identity = {});
    ~SourceFile();
    SourceFile(const SourceFile&) = delete;
    SourceFile& operator=(const SourceFile&) = delete;

    const std::string& path() const noexcept { return path_; }
    int fd() const noexcept { return fd_; }
    const FileIdentity& identity() const noexcept { return identity_; }
    bool same_file(int fd) const noexcept;  // the same inode, whatever is in it by now
    // "" while what `fd` leads to has the size and time of then, else "changed since the model was loaded (...)".
    std::string change(int fd) const;
    // The path's file of now, where it is another than this one with the same size, time and sample: one that was put
    // in place of a damaged one with its time (cp -p, rsync -t). nullptr: there is none.
    std::shared_ptr<const SourceFile> successor() const;

  private:
    std::string path_;
    int fd_ = -1;
    FileIdentity identity_;
    std::uint64_t sample_ = 0;  // of bytes at places all over the file, when it was added
};

}  // namespace emoe
