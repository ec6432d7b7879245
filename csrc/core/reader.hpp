// What reads bytes from files: opened files, and channels through which one thread keeps reads in flight.
// Knows nothing of records or slots; implementations are in csrc/io.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <utility>

#include "core/source_file.hpp"

namespace emoe {

// A source file as a reader reads it. Where direct() holds, offset, length and address of every read divide by
// alignment().
class File {
  public:
    // Closes `fd` in the end, unless it is the source's own.
    File(int fd, std::shared_ptr<const SourceFile> source, std::int64_t alignment)
        : fd_(fd), source_(std::move(source)), alignment_(alignment) {}
    ~File();
    File(const File&) = delete;
    File& operator=(const File&) = delete;

    int fd() const noexcept { return fd_; }
    const std::string& path() const noexcept { return source_->path(); }
    std::int64_t alignment() const noexcept { return alignment_; }  // 1 where reads go through the page cache
    bool direct() const noexcept { return alignment_ > 1; }
    std::int64_t size() const noexcept;  // asked of the file system each time; -1 where it does not answer
    // As SourceFile::change. What was read before it answered "" is what was there when the file was added.
    std::string change() const { return fd_ < 0 ? "" : source_->change(fd_); }
    const SourceFile& source() const noexcept { return *source_; }

  private:
    int fd_;
    std::shared_ptr<const SourceFile> source_;
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
    virtual std::unique_ptr<File> open(std::shared_ptr<const SourceFile> source) = 0;  // ReadError
    virtual std::unique_ptr<ReadChannel> channel() = 0;
};

}  // namespace emoe
