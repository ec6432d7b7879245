// What reads bytes from files: opened files, and channels through which one thread keeps reads in flight.
// Knows nothing of records or slots; implementations are in csrc/io.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <utility>

namespace emoe {

// An open file descriptor. Where direct() holds, offset, length and address of every read divide by alignment().
class File {
  public:
    File(int fd, std::string path, std::int64_t alignment) : fd_(fd), path_(std::move(path)), alignment_(alignment) {}
    ~File();
    File(const File&) = delete;
    File& operator=(const File&) = delete;

    int fd() const noexcept { return fd_; }
    const std::string& path() const noexcept { return path_; }
    std::int64_t alignment() const noexcept { return alignment_; }  // 1 where reads go through the page cache
    bool direct() const noexcept { return alignment_ > 1; }
    std::int64_t size() const noexcept;  // asked of the file system each time; -1 where it does not answer

  private:
    int fd_;
    std::string path_;
    std::int64_t alignment_;
};

struct ReadRequest {
    const File* file;
    std::int64_t offset;
    std::span<std::byte> into;
    std::size_t tag;  // given back in the result
};

struct ReadResult {
    std::size_t tag;
    std::int64_t result;  // bytes read, 0 at end of file, or a negative errno
};

// Used by one thread. A buffer handed to submit() belongs to the channel until next() has returned its tag.
class ReadChannel {
  public:
    virtual ~ReadChannel() = default;
    virtual std::size_t depth() const noexcept = 0;        // reads that may be in flight at once
    virtual std::size_t chunk_bytes() const noexcept = 0;  // good size of one read through a bounce buffer
    virtual void submit(const ReadRequest& request) = 0;   // never blocks; at most depth() in flight
    virtual void flush() = 0;       // starts what was submitted; next() does so too before it blocks
    virtual ReadResult next() = 0;  // blocks; needs at least one read in flight; completion order is free
};

// Shared by threads; makes a channel for each.
class Reader {
  public:
    virtual ~Reader() = default;
    virtual std::string name() const = 0;
    virtual bool direct() const noexcept = 0;  // false once a file system has refused O_DIRECT
    virtual std::string note() const = 0;  // why this reader, or why not direct, where that was not asked for; or ""
    virtual std::unique_ptr<File> open(const std::string& path) = 0;  // ReadError
    virtual std::unique_ptr<ReadChannel> channel() = 0;
};

}  // namespace emoe
