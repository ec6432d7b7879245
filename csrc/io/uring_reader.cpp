#include "io/uring_reader.hpp"

#include <linux/io_uring.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <cstring>
#include <system_error>
#include <utility>

#include "core/error.hpp"

namespace emoe::io {
namespace {

constexpr unsigned kDepth = 8;

std::string reason(const char* call) {
    return std::string(call) + " failed: " + std::generic_category().message(errno);
}

class Mapping {
  public:
    Mapping() = default;
    Mapping(int fd, std::size_t bytes, off_t what) : bytes_(bytes) {
        data_ = ::mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, fd, what);
        if (data_ == MAP_FAILED) throw Error(ErrorKind::kBackendUnavailable, reason("mmap of an io_uring"));
    }
    Mapping(Mapping&& other) noexcept
        : data_(std::exchange(other.data_, MAP_FAILED)), bytes_(std::exchange(other.bytes_, 0)) {}
    Mapping& operator=(Mapping&& other) noexcept {
        std::swap(data_, other.data_);
        std::swap(bytes_, other.bytes_);
        return *this;
    }
    ~Mapping() {
        if (data_ != MAP_FAILED) ::munmap(data_, bytes_);
    }
    template <typename T>
    T* at(std::uint32_t offset) const {
        return reinterpret_cast<T*>(static_cast<std::byte*>(data_) + offset);
    }

  private:
    void* data_ = MAP_FAILED;
    std::size_t bytes_ = 0;
};

class Descriptor {
  public:
    explicit Descriptor(int fd) : fd_(fd) {}
    Descriptor(const Descriptor&) = delete;
    Descriptor& operator=(const Descriptor&) = delete;
    ~Descriptor() {
        if (fd_ >= 0) ::close(fd_);
    }
    int get() const { return fd_; }

  private:
    int fd_;
};

class UringChannel final : public ReadChannel {
  public:
    UringChannel() : ring_(setup(parameters_)) {
        if (ring_.get() < 0) throw Error(ErrorKind::kBackendUnavailable, reason("io_uring_setup"));
        if ((parameters_.features & IORING_FEAT_SINGLE_MMAP) == 0 || (parameters_.features & IORING_FEAT_NODROP) == 0) {
            throw Error(ErrorKind::kBackendUnavailable, "io_uring of this kernel is too old (5.5 is needed)");
        }
        const auto& sq = parameters_.sq_off;
        const auto& cq = parameters_.cq_off;
        const std::size_t sq_bytes = sq.array + parameters_.sq_entries * sizeof(std::uint32_t);
        const std::size_t cq_bytes = cq.cqes + parameters_.cq_entries * sizeof(io_uring_cqe);
        rings_ = Mapping(ring_.get(), sq_bytes > cq_bytes ? sq_bytes : cq_bytes, IORING_OFF_SQ_RING);
        entries_ = Mapping(ring_.get(), parameters_.sq_entries * sizeof(io_uring_sqe), IORING_OFF_SQES);
    }

    ~UringChannel() override {
        // The kernel still writes into the buffers of reads in flight; whoever owns them frees them after this.
        try {
            while (in_flight_ > 0) next();
        } catch (const Error&) {  // the ring itself is broken; closing it below ends its reads
        }
    }

    std::size_t depth() const noexcept override { return kDepth; }
    std::size_t chunk_bytes() const noexcept override { return std::size_t{2} << 20; }

    void submit(const ReadRequest& request) override {
        const std::uint32_t tail = *rings_.at<std::uint32_t>(parameters_.sq_off.tail);
        const std::uint32_t index = tail & *rings_.at<std::uint32_t>(parameters_.sq_off.ring_mask);
        io_uring_sqe& entry = entries_.at<io_uring_sqe>(0)[index];
        std::memset(&entry, 0, sizeof entry);
        entry.opcode = IORING_OP_READ;
        entry.fd = request.file->fd();
        entry.off = static_cast<std::uint64_t>(request.offset);
        entry.addr = reinterpret_cast<std::uint64_t>(request.into.data());
        entry.len = static_cast<std::uint32_t>(request.into.size());
        entry.user_data = request.tag;
        rings_.at<std::uint32_t>(parameters_.sq_off.array)[index] = index;
        shared(parameters_.sq_off.tail).store(tail + 1, std::memory_order_release);
        ++unsubmitted_;
        ++in_flight_;
    }

    void flush() override {
        if (unsubmitted_ > 0) enter(0);
    }

    ReadResult next() override {
        const std::atomic_ref<std::uint32_t> head = shared(parameters_.cq_off.head);
        const std::atomic_ref<std::uint32_t> tail = shared(parameters_.cq_off.tail);
        const std::uint32_t position = head.load(std::memory_order_relaxed);
        // What has arrived is handled before new reads are started, so that these go to the kernel together.
        while (position == tail.load(std::memory_order_acquire)) enter(1);
        const std::uint32_t mask = *rings_.at<std::uint32_t>(parameters_.cq_off.ring_mask);
        const io_uring_cqe& entry = rings_.at<io_uring_cqe>(parameters_.cq_off.cqes)[position & mask];
        const ReadResult result{static_cast<std::size_t>(entry.user_data), entry.res};
        head.store(position + 1, std::memory_order_release);
        --in_flight_;
        return result;
    }

  private:
    static int setup(io_uring_params& parameters) {
        return static_cast<int>(::syscall(SYS_io_uring_setup, kDepth, &parameters));
    }

    std::atomic_ref<std::uint32_t> shared(std::uint32_t offset) const {
        return std::atomic_ref<std::uint32_t>(*rings_.at<std::uint32_t>(offset));
    }

    void enter(unsigned wait_for) {
        const long taken = ::syscall(SYS_io_uring_enter, ring_.get(), unsubmitted_, wait_for,
                                     wait_for > 0 ? IORING_ENTER_GETEVENTS : 0U, nullptr, 0);
        if (taken >= 0) {
            unsubmitted_ -= static_cast<unsigned>(taken);
        } else if (errno != EINTR && errno != EAGAIN && errno != EBUSY) {
            throw Error(ErrorKind::kTransfer, reason("io_uring_enter"));
        }
    }

    io_uring_params parameters_{};
    Descriptor ring_;
    Mapping rings_;
    Mapping entries_;
    unsigned unsubmitted_ = 0;  // filled entries the kernel has not been told of
    unsigned in_flight_ = 0;
};

}  // namespace

std::string uring_refusal() {
    try {
        UringChannel().depth();
        return "";
    } catch (const Error& error) {
        return error.message;
    }
}

std::unique_ptr<ReadChannel> UringReader::channel() { return std::make_unique<UringChannel>(); }

}  // namespace emoe::io
