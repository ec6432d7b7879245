// The readers on real files: right bytes, several in flight, ends of files, files that cannot be opened, injected
// faults.
#include "core/reader.hpp"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iostream>
#include <random>
#include <string>
#include <vector>

#include "core/slab.hpp"
#include "io/faulty_reader.hpp"
#include "io/make_reader.hpp"
#include "io/uring_reader.hpp"
#include "tests/check.hpp"
#include "tests/fake_reader.hpp"

using namespace emoe;
using emoe::test::pattern;

namespace {

class TempFile {
  public:
    explicit TempFile(std::int64_t bytes) {
        char name[] = "emoe_test_XXXXXX";  // in the build folder: a real file system, where /tmp may be memory
        const int fd = ::mkstemp(name);
        if (fd < 0) throw std::runtime_error("mkstemp failed");
        ::close(fd);
        path_ = std::filesystem::absolute(name).string();
        std::vector<char> data(static_cast<std::size_t>(bytes));
        for (std::int64_t i = 0; i < bytes; ++i) data[static_cast<std::size_t>(i)] = static_cast<char>(pattern(i));
        std::ofstream(path_, std::ios::binary).write(data.data(), bytes);
    }
    ~TempFile() { std::filesystem::remove(path_); }
    TempFile(const TempFile&) = delete;
    TempFile& operator=(const TempFile&) = delete;
    const std::string& path() const { return path_; }

  private:
    std::string path_;
};

std::shared_ptr<const SourceFile> source(const std::string& path) { return std::make_shared<const SourceFile>(path); }

struct PageBuffer {
    explicit PageBuffer(std::int64_t bytes)
        : data(static_cast<std::byte*>(std::aligned_alloc(kPageBytes, static_cast<std::size_t>(bytes))), &std::free) {}
    std::unique_ptr<std::byte, void (*)(void*)> data;
};

template <typename Fn>
void for_each_reader(Fn&& fn) {
    for (const char* kind : {"pread", "uring"}) {
        if (std::string(kind) == "uring" && !io::uring_refusal().empty()) {
            std::cout << "not supported here: " << io::uring_refusal() << "\n";
            continue;
        }
        for (const bool direct : {true, false}) fn(*io::make_reader(kind, direct), direct);
    }
}

}  // namespace

TEST("every reader gives the file's bytes, with as many reads in flight as it offers") {
    constexpr std::int64_t kFile = 3'000'001;
    const TempFile temp(kFile);
    for_each_reader([&](Reader& reader, bool) {
        const std::unique_ptr<File> file = reader.open(source(temp.path()));
        CHECK_EQ(file->size(), kFile);
        const std::unique_ptr<ReadChannel> channel = reader.channel();
        const auto capacity = static_cast<std::int64_t>(channel->chunk_bytes());
        std::mt19937 random(1);
        for (int round = 0; round < 20; ++round) {
            std::vector<PageBuffer> buffers;
            std::vector<ReadRequest> requests;
            for (std::size_t i = 0; i < channel->depth(); ++i) {
                buffers.emplace_back(capacity);
                const std::int64_t a = file->alignment();
                const std::int64_t offset = align_down(static_cast<std::int64_t>(random()) % (kFile + a), a);
                const std::int64_t length = align_up(1 + static_cast<std::int64_t>(random()) % (capacity - a), a);
                requests.push_back({file.get(), offset, {buffers[i].data.get(), static_cast<std::size_t>(length)}, i});
                channel->submit(requests.back());
            }
            std::vector<bool> seen(requests.size());
            for (std::size_t i = 0; i < requests.size(); ++i) {
                const ReadResult result = channel->next();
                CHECK(!seen[result.tag]);
                seen[result.tag] = true;
                const ReadRequest& request = requests[result.tag];
                const auto wanted = static_cast<std::int64_t>(request.into.size());
                CHECK_EQ(result.result, std::clamp<std::int64_t>(kFile - request.offset, 0, wanted));
                for (std::int64_t b = 0; b < result.result; b += 1 + b % 7) {
                    CHECK(request.into[static_cast<std::size_t>(b)] == pattern(request.offset + b));
                }
            }
        }
    });
}

TEST("a reader that was told not to read directly does not, and one that was says whether it does") {
    const TempFile temp(10000);
    for_each_reader([&](Reader& reader, bool direct) {
        const std::unique_ptr<File> file = reader.open(source(temp.path()));
        CHECK_EQ(file->direct(), reader.direct());
        if (!direct) CHECK(!reader.direct());
        if (direct && !reader.direct()) CHECK(reader.note().find("refuses O_DIRECT") != std::string::npos);
    });
}

TEST("a file system that refuses O_DIRECT is read through the page cache, which the reader then says") {
    for_each_reader([&](Reader& reader, bool direct) {
        const std::unique_ptr<File> file = reader.open(source("/proc/self/status"));
        CHECK(!file->direct());
        CHECK(!reader.direct());
        CHECK_EQ(reader.note().find("/proc/self/status refuses O_DIRECT") != std::string::npos, direct);
        std::byte buffer[16];
        const std::unique_ptr<ReadChannel> channel = reader.channel();
        channel->submit({file.get(), 0, buffer, 3});
        const ReadResult result = channel->next();
        CHECK_EQ(result.tag, std::size_t{3});
        CHECK_EQ(result.result, 16);
    });
}

TEST("a file that cannot be opened is an error with its name") {
    for_each_reader([](Reader& reader, bool) {
        const Error error = ERROR_OF(reader.open(source("/nonexistent/shard.safetensors")));
        CHECK_EQ(static_cast<int>(error.kind), static_cast<int>(ErrorKind::kRead));
        CHECK_EQ(error.file, std::string("/nonexistent/shard.safetensors"));
        CHECK(error.message.find("No such file") != std::string::npos);
    });
}

TEST("a read that fails gives its error number") {
    for_each_reader([](Reader& reader, bool) {
        const TempFile temp(kPageBytes);
        const int fd = ::open(temp.path().c_str(), O_WRONLY | O_CLOEXEC);
        const auto file = std::make_unique<File>(fd, source(temp.path()), 1);
        const std::unique_ptr<ReadChannel> channel = reader.channel();
        const PageBuffer buffer(kPageBytes);
        channel->submit({file.get(), 0, {buffer.data.get(), static_cast<std::size_t>(kPageBytes)}, 0});
        CHECK_EQ(channel->next().result, -EBADF);
    });
}

TEST("a channel that is destroyed with reads in flight waits for them") {
    const TempFile temp(4 << 20);
    for_each_reader([&](Reader& reader, bool) {
        const std::unique_ptr<File> file = reader.open(source(temp.path()));
        const PageBuffer buffer(1 << 20);
        for (int i = 0; i < 20; ++i) {
            const std::unique_ptr<ReadChannel> channel = reader.channel();
            channel->submit({file.get(), 0, {buffer.data.get(), std::size_t{1} << 20}, 0});
        }
    });
}

TEST("reader names are checked, and auto takes what the kernel allows") {
    const Error error = ERROR_OF(io::make_reader("mmap", true));
    CHECK_EQ(static_cast<int>(error.kind), static_cast<int>(ErrorKind::kConfig));
    CHECK_EQ(error.message, std::string("reader 'mmap' is not one of: auto, uring, pread"));
    const auto reader = io::make_reader("auto", true);
    const std::string refusal = io::uring_refusal();
    CHECK_EQ(reader->name(), std::string(refusal.empty() ? "uring" : "pread"));
    CHECK_EQ(reader->note().empty(), refusal.empty());
    if (!refusal.empty()) CHECK_ERROR(ErrorKind::kBackendUnavailable, io::make_reader("uring", true));
}

TEST("an injected fault hits the read it was meant for, over all channels of the reader") {
    const TempFile temp(100000);
    for_each_reader([&](Reader& plain, bool direct) {
        const auto reader = io::make_faulty_reader(io::make_reader(plain.name(), direct), {1, EIO, 3, 0});
        CHECK_EQ(reader->name(), "faulty " + plain.name());
        const std::unique_ptr<File> file = reader->open(source(temp.path()));
        const PageBuffer buffer(8192);
        std::vector<std::int64_t> results;
        for (int i = 0; i < 5; ++i) {
            const std::unique_ptr<ReadChannel> channel = reader->channel();
            channel->submit({file.get(), 0, {buffer.data.get(), 8192}, 0});
            results.push_back(channel->next().result);
        }
        CHECK(results == (std::vector<std::int64_t>{8192, -EIO, 8192, 4096, 8192}));
    });
}

TEST("a delayed reader takes its time") {
    const TempFile temp(8192);
    const auto reader = io::make_faulty_reader(io::make_reader("pread", false), {-1, EIO, -1, 20});
    const std::unique_ptr<File> file = reader->open(source(temp.path()));
    const std::unique_ptr<ReadChannel> channel = reader->channel();
    const PageBuffer buffer(4096);
    const auto start = std::chrono::steady_clock::now();
    channel->submit({file.get(), 0, {buffer.data.get(), 4096}, 0});
    CHECK_EQ(channel->next().result, 4096);
    CHECK(std::chrono::steady_clock::now() - start >= std::chrono::milliseconds(20));
}

EMOE_TEST_MAIN
