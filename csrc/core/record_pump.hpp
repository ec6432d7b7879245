// Brings records into host memory through one read channel: cuts them into chunks, keeps the channel full, scatters
// what arrives. One worker's; decides nothing about order or slots.
#pragma once

#include <cstddef>
#include <cstdint>
#include <deque>
#include <memory>
#include <optional>
#include <set>
#include <span>
#include <vector>

#include "core/error.hpp"
#include "core/fork.hpp"
#include "core/reader.hpp"
#include "core/record.hpp"

namespace emoe {

// The files of a table as a reader reads them; those that are there are opened at once. Shared by the pumps of a queue.
class OpenFiles {
  public:
    OpenFiles(std::shared_ptr<const RecordTable> table, std::shared_ptr<Reader> reader);  // ReadError
    // Valid as long as this object. A file that has changed makes way for its successor (SourceFile), if there is one.
    const File& get(std::int64_t id);
    void doubt(const File& file);  // it has changed: get() looks for a successor from now on

  private:
    std::shared_ptr<const RecordTable> table_;
    std::shared_ptr<Reader> reader_;
    ForkMutex mutex_{ForkMutex::Level::kFiles};
    std::vector<std::unique_ptr<File>> files_;
    std::set<const File*> doubtful_;
    std::vector<std::unique_ptr<File>> replaced_;  // reads of them may be in flight
};

// Anonymous memory in huge pages where the kernel has some, mapped when first asked for. Not from malloc: what that
// hands out may have been touched in small pages before.
class HugeBuffer {
  public:
    HugeBuffer() = default;
    ~HugeBuffer();
    HugeBuffer(const HugeBuffer&) = delete;
    HugeBuffer& operator=(const HugeBuffer&) = delete;
    std::byte* get(std::size_t bytes);  // the same size each time; std::bad_alloc

  private:
    void* mapping_ = nullptr;
    std::size_t mapped_ = 0;
};

class RecordPump {
  public:
    struct Finished {
        std::uint64_t id;
        std::optional<Error> error;
    };

    RecordPump(std::unique_ptr<ReadChannel> channel, OpenFiles& files);
    ~RecordPump();
    RecordPump(const RecordPump&) = delete;
    RecordPump& operator=(const RecordPump&) = delete;

    bool busy() const noexcept { return !jobs_.empty(); }
    // True where another record would keep more reads in flight: all chunks of the last one are on their way.
    bool wants_more() const noexcept;
    // Begins to fill `slot`, which stays this pump's until step() has returned the same id.
    void start(std::uint64_t id, std::shared_ptr<const Record> record, std::span<std::byte> slot);
    // Blocks until something arrives, or scatters what has arrived: between the two there is room to start more, so
    // that the disk is busy meanwhile. Returns a record that is now complete, or has failed, if there is one. A failed
    // one is returned only when no read into its slot is in flight any more. Where the channel itself breaks, every
    // record from then on fails with its error.
    std::optional<Finished> step();

  private:
    struct Job {
        std::uint64_t id = 0;
        std::shared_ptr<const Record> record;
        std::span<std::byte> slot;
        std::size_t extent = 0;     // next chunk: in this extent,
        std::size_t segment = 0;    // this segment,
        std::int64_t position = 0;  // from this byte of the file
        int in_flight = 0;
        std::optional<Error> error;
        bool cut() const { return error || extent == record->extents.size(); }
    };
    // Part of an extent, read at once: [begin, begin + length) of a file, of which [first, last) is wanted.
    struct Cut {
        const File* file = nullptr;
        std::size_t extent = 0;
        std::size_t segment = 0;  // holds `first`
        std::int64_t first = 0;
        std::int64_t last = 0;
        std::int64_t begin = 0;
        std::int64_t length = 0;
        std::byte* straight = nullptr;  // where it goes in the slot; nullptr: through a bounce buffer
    };
    // A read in flight.
    struct Chunk {
        Job* job = nullptr;  // nullptr: free
        Cut cut;
        std::byte* into = nullptr;
        std::int64_t got = 0;
    };

    void fill();
    Cut next_cut(const Job& job);
    Chunk* free_chunk(const Cut& cut);
    void advance(Job& job, std::int64_t last) const;
    void request(Chunk& chunk);
    void arrived(Chunk& chunk, std::int64_t result);
    void scatter_chunk(const Chunk& chunk);
    void release(Chunk& chunk);
    void fail(const Chunk& chunk, const std::string& why);
    void give_up(const Error& why);

    std::unique_ptr<ReadChannel> channel_;
    std::optional<Error> broken_;  // what the channel ended with
    OpenFiles& files_;
    std::vector<Chunk> chunks_;
    Chunk* landed_ = nullptr;                // in its bounce buffer, not yet scattered
    std::deque<std::unique_ptr<Job>> jobs_;  // only the last may have chunks left to cut

    // The first `large_` chunks have large bounce buffers, the others small ones. Few large ones are best: bytes stay
    // in the cache between arriving and being scattered. One of them stays free for the next read while another is
    // scattered. Small ones let many short reads be in flight.
    std::size_t large_;
    std::int64_t large_bytes_;
    std::int64_t small_bytes_;
    std::int64_t slack_;  // what every buffer has beyond that, so that a short rest joins the chunk before it
    HugeBuffer bounce_;
};

}  // namespace emoe
