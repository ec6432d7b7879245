// A reader without files: byte i of every file is pattern(i), and a test decides when each read completes and how.
#pragma once

#include <algorithm>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <functional>
#include <limits>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "core/error.hpp"
#include "core/reader.hpp"

namespace emoe::test {

inline std::byte pattern(std::int64_t i) {
    return static_cast<std::byte>((static_cast<std::uint64_t>(i) * 0x9E3779B97F4A7C15ULL) >> 56);
}

class FakeReader final : public Reader {
  public:
    std::size_t depth = 1;
    std::size_t chunk_bytes = 8192;
    std::int64_t alignment = 4096;
    std::int64_t file_bytes = std::numeric_limits<std::int64_t>::max() / 2;
    bool newest_first = false;  // completion order within a channel
    // Called for read number n (from 0, in completion order) with what it would give; returns what it gives instead.
    std::function<std::int64_t(std::int64_t n, std::int64_t result)> change;
    bool break_channels = false;  // next() throws

    std::string name() const override { return "fake"; }
    bool direct() const noexcept override { return alignment > 1; }
    std::string note() const override { return ""; }
    std::unique_ptr<File> open(std::shared_ptr<const SourceFile> source) override {
        return std::make_unique<File>(-1, std::move(source), alignment);
    }
    std::unique_ptr<ReadChannel> channel() override { return std::make_unique<Channel>(*this); }

    // Reads wait at a gate until the test lets them through; open_gate() lets all through from now on.
    void close_gate() {
        const std::lock_guard lock(mutex_);
        permits_ = 0;
    }
    void let_through(std::int64_t reads) {
        const std::lock_guard lock(mutex_);
        permits_ += reads;
        changed_.notify_all();
    }
    void open_gate() {
        const std::lock_guard lock(mutex_);
        permits_ = kOpen;
        changed_.notify_all();
    }
    // Blocks until `reads` reads have been asked for in all.
    void wait_until_asked(std::size_t reads) {
        std::unique_lock lock(mutex_);
        changed_.wait(lock, [&] { return asked_.size() >= reads; });
    }
    std::vector<std::int64_t> asked() const {  // offsets, in order
        const std::lock_guard lock(mutex_);
        return asked_;
    }

  private:
    static constexpr std::int64_t kOpen = std::numeric_limits<std::int64_t>::max() / 2;

    class Channel final : public ReadChannel {
      public:
        explicit Channel(FakeReader& reader) : reader_(reader) {}
        std::size_t depth() const noexcept override { return reader_.depth; }
        std::size_t chunk_bytes() const noexcept override { return reader_.chunk_bytes; }
        void submit(const ReadRequest& request) override {
            pending_.push_back(request);
            const std::lock_guard lock(reader_.mutex_);
            reader_.asked_.push_back(request.offset);
            reader_.changed_.notify_all();
        }
        void flush() override {}
        ReadResult next() override {
            if (reader_.break_channels) throw Error(ErrorKind::kTransfer, "the fake channel broke");
            std::int64_t number = 0;
            {
                std::unique_lock lock(reader_.mutex_);
                reader_.changed_.wait(lock, [&] { return reader_.permits_ > 0; });
                if (reader_.permits_ < kOpen) --reader_.permits_;
                number = reader_.completed_++;
            }
            const ReadRequest request = reader_.newest_first ? pending_.back() : pending_.front();
            reader_.newest_first ? pending_.pop_back() : pending_.pop_front();
            const auto wanted = static_cast<std::int64_t>(request.into.size());
            std::int64_t result = std::clamp(reader_.file_bytes - request.offset, std::int64_t{0}, wanted);
            if (reader_.change) result = reader_.change(number, result);
            for (std::int64_t i = 0; i < result; ++i) {
                request.into[static_cast<std::size_t>(i)] = pattern(request.offset + i);
            }
            return {request.tag, result};
        }

      private:
        FakeReader& reader_;
        std::deque<ReadRequest> pending_;
    };

    mutable std::mutex mutex_;
    std::condition_variable changed_;
    std::int64_t permits_ = kOpen;
    std::int64_t completed_ = 0;
    std::vector<std::int64_t> asked_;
};

}  // namespace emoe::test
