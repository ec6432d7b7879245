#include "core/record_pump.hpp"

#include <sys/mman.h>

#include <algorithm>
#include <cerrno>
#include <new>
#include <string>
#include <system_error>
#include <utility>

#include "core/slab.hpp"

namespace emoe {
namespace {

constexpr std::int64_t kStraightBytes = std::int64_t{4} << 20;   // one read straight into the slot
constexpr std::int64_t kWorthStraight = std::int64_t{64} << 10;  // less than this joins its neighbours in a bounce read

constexpr std::int64_t kMostSlack = std::int64_t{64} << 10;
constexpr std::size_t kHugePage = std::size_t{2} << 20;

std::int64_t address(const std::byte* pointer) {
    return static_cast<std::int64_t>(reinterpret_cast<std::uintptr_t>(pointer));
}

// Plain, and file offset and slot address agree modulo the alignment: an aligned part of it can be read in place.
bool congruent(const Segment& segment, const std::byte* slot, std::int64_t alignment) {
    return segment.plain && (address(slot) + segment.dst_offset - segment.offset) % alignment == 0;
}

const Piece& piece_at(const Record& record, std::int64_t file, std::int64_t offset) {
    for (const Piece& piece : record.pieces) {
        if (piece.file == file && offset >= piece.offset && offset < piece.offset + piece.nbytes) return piece;
    }
    return record.pieces.front();
}

}  // namespace

OpenFiles::OpenFiles(std::shared_ptr<const RecordTable> table, std::shared_ptr<Reader> reader)
    : table_(std::move(table)), reader_(std::move(reader)) {
    for (std::int64_t id = 0; id < table_->files(); ++id) get(id);
}

const File& OpenFiles::get(std::int64_t id) {
    const std::lock_guard lock(mutex_);
    const auto index = static_cast<std::size_t>(id);
    if (index >= files_.size()) files_.resize(index + 1);
    std::unique_ptr<File>& file = files_[index];
    if (!file) file = reader_->open(table_->file(id));
    if (!doubtful_.empty() && doubtful_.contains(file.get())) {
        if (auto successor = file->source().successor()) {
            doubtful_.erase(file.get());
            replaced_.push_back(std::exchange(file, reader_->open(std::move(successor))));
        }
    }
    return *file;
}

void OpenFiles::doubt(const File& file) {
    const std::lock_guard lock(mutex_);
    doubtful_.insert(&file);
}

HugeBuffer::~HugeBuffer() {
    if (mapping_ != nullptr) ::munmap(mapping_, mapped_);
}

std::byte* HugeBuffer::get(std::size_t bytes) {
    if (mapping_ == nullptr) {
        const std::size_t wanted = bytes + kHugePage;  // room to align; what is not touched costs nothing
        void* memory = ::mmap(nullptr, wanted, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (memory == MAP_FAILED) throw std::bad_alloc();
        // Pinning 4 KiB pages for a direct read costs as much as copying them. Advice only.
        ::madvise(memory, wanted, MADV_HUGEPAGE);
        mapping_ = memory;
        mapped_ = wanted;
    }
    const auto start = reinterpret_cast<std::uintptr_t>(mapping_);
    return reinterpret_cast<std::byte*>((start + kHugePage - 1) / kHugePage * kHugePage);
}

RecordPump::RecordPump(std::unique_ptr<ReadChannel> channel, OpenFiles& files)
    : channel_(std::move(channel)),
      files_(files),
      chunks_(channel_->depth()),
      large_(chunks_.size() < 4 ? 1 : 3),
      large_bytes_(static_cast<std::int64_t>(channel_->chunk_bytes())),
      small_bytes_(std::max(2 * kPageBytes, align_down(large_bytes_ / 8, kPageBytes))),
      slack_(std::min(kMostSlack, align_down(large_bytes_ / 8, kPageBytes))) {}

RecordPump::~RecordPump() { channel_.reset(); }  // before the buffers its reads may still write to

bool RecordPump::wants_more() const noexcept {
    const auto is_free = [](const Chunk& chunk) { return chunk.job == nullptr; };
    return (jobs_.empty() || jobs_.back()->cut()) && std::any_of(chunks_.begin(), chunks_.end(), is_free);
}

void RecordPump::start(std::uint64_t id, std::shared_ptr<const Record> record, std::span<std::byte> slot) {
    auto job = std::make_unique<Job>();
    job->id = id;
    job->record = std::move(record);
    job->slot = slot;
    job->position = job->record->extents.front().segments.front().offset;
    job->error = broken_;
    jobs_.push_back(std::move(job));
    fill();
}

std::optional<RecordPump::Finished> RecordPump::step() {
    const auto finished = [this]() -> std::optional<Finished> {
        const auto over = [](const std::unique_ptr<Job>& job) { return job->cut() && job->in_flight == 0; };
        const auto found = std::find_if(jobs_.begin(), jobs_.end(), over);
        if (found == jobs_.end()) return std::nullopt;
        Finished result{(*found)->id, std::move((*found)->error)};
        jobs_.erase(found);
        return result;
    };
    if (auto result = finished()) return result;  // it could not even be started
    if (landed_ != nullptr) {
        Chunk& chunk = *std::exchange(landed_, nullptr);
        try {
            if (chunk.cut.length > small_bytes_ + slack_) channel_->flush();  // this takes a while
            if (!chunk.job->error) scatter_chunk(chunk);
            release(chunk);
        } catch (const Error& error) {
            give_up(error);
        }
        fill();
        return finished();
    }
    try {
        const ReadResult result = channel_->next();
        arrived(chunks_[result.tag], result.result);
    } catch (const Error& error) {
        give_up(error);
    }
    fill();
    return finished();
}

void RecordPump::give_up(const Error& why) {
    channel_.reset();
    broken_ = why;
    for (const std::unique_ptr<Job>& job : jobs_) {
        if (!job->error) job->error = why;
        job->in_flight = 0;
    }
    for (Chunk& chunk : chunks_) chunk.job = nullptr;
    landed_ = nullptr;
}

void RecordPump::fill() {
    while (!jobs_.empty() && !jobs_.back()->cut()) {
        Job& job = *jobs_.back();
        try {
            const Cut cut = next_cut(job);
            Chunk* const chunk = free_chunk(cut);
            if (chunk == nullptr) return;
            chunk->job = &job;
            chunk->cut = cut;
            chunk->got = 0;
            ++job.in_flight;
            advance(job, cut.last);
            request(*chunk);
        } catch (const Error& error) {
            job.error = error;
        } catch (const std::bad_alloc&) {
            job.error = Error(ErrorKind::kTransfer, "no memory for bounce buffers");
        }
    }
}

// A free chunk whose buffer is large enough, small ones first; nullptr: there is none now.
RecordPump::Chunk* RecordPump::free_chunk(const Cut& cut) {
    const std::int64_t small_each = small_bytes_ + slack_;
    const std::int64_t large_each = large_bytes_ + slack_;
    std::size_t large_reads = 0;
    for (std::size_t i = 0; i < large_; ++i) large_reads += chunks_[i].job != nullptr && &chunks_[i] != landed_;
    for (std::size_t i = chunks_.size(); i-- > 0;) {
        Chunk& chunk = chunks_[i];
        const bool large = i < large_;
        if (chunk.job != nullptr) continue;
        if (cut.straight != nullptr) {
            chunk.into = cut.straight;
            return &chunk;
        }
        if (cut.length > (large ? large_each : small_each)) continue;
        if (large && large_ > 1 && large_reads == large_ - 1) return nullptr;
        const auto large_part = static_cast<std::int64_t>(large_) * large_each;
        const auto small_part = static_cast<std::int64_t>(chunks_.size() - large_) * small_each;
        const auto in_large = static_cast<std::int64_t>(std::min(i, large_));
        const auto in_small = static_cast<std::int64_t>(i) - in_large;
        chunk.into = bounce_.get(static_cast<std::size_t>(large_part + small_part)) + in_large * large_each +
                     in_small * small_each;
        return &chunk;
    }
    return nullptr;
}

// The next part of the job that is read at once.
RecordPump::Cut RecordPump::next_cut(const Job& job) {
    const Extent& extent = job.record->extents[job.extent];
    const Segment& segment = extent.segments[job.segment];
    const File& file = files_.get(extent.file);
    const std::int64_t alignment = file.alignment();
    const std::int64_t first = job.position;
    const std::int64_t rest = segment.end() - first;
    std::byte* const place = job.slot.data() + segment.dst_offset + (first - segment.offset);

    std::int64_t last = first;
    if (congruent(segment, job.slot.data(), alignment) && first % alignment == 0) {
        // Behind the record's last byte a slot holds nothing, so a read may run over it to the next aligned address.
        const bool nothing_behind = segment.dst_offset + segment.nbytes == job.record->slot_bytes &&
                                    place + align_up(rest, alignment) <= job.slot.data() + job.slot.size();
        if (rest % alignment == 0 || nothing_behind) {
            last = first + std::min(rest, kStraightBytes);
        } else if (rest >= kWorthStraight) {
            last = first + std::min(align_down(rest, alignment), kStraightBytes);
        }
    }
    const bool straight = last > first;
    const std::int64_t begin = align_down(first, alignment);
    if (!straight) {
        const std::int64_t end = extent.segments.back().end();
        last = end - begin <= large_bytes_ + slack_ ? end : begin + large_bytes_;
        for (std::size_t i = job.segment; i < extent.segments.size() && extent.segments[i].offset < last; ++i) {
            const Segment& each = extent.segments[i];
            const std::int64_t in_place = align_up(std::max(each.offset, first), alignment);
            if (in_place > first && in_place < last && each.end() - in_place >= kWorthStraight &&
                congruent(each, job.slot.data(), alignment)) {
                last = in_place;
            } else if (!each.plain && each.end() > last) {
                last -= encoding_of(each.layout.src_dtype).partial(last - each.offset);  // blocks stay whole
            }
        }
    }
    return {&file,
            job.extent,
            job.segment,
            first,
            last,
            begin,
            align_up(last, alignment) - begin,
            straight ? place : nullptr};
}

// Moves the job's position to the first wanted byte from `last` on.
void RecordPump::advance(Job& job, std::int64_t last) const {
    const std::vector<Segment>& segments = job.record->extents[job.extent].segments;
    while (job.segment < segments.size() && segments[job.segment].end() <= last) ++job.segment;
    if (job.segment < segments.size()) {
        job.position = std::max(last, segments[job.segment].offset);
    } else if (job.segment = 0; ++job.extent < job.record->extents.size()) {
        job.position = job.record->extents[job.extent].segments.front().offset;
    }
}

// Asks for what is missing, from the last aligned position before it.
void RecordPump::request(Chunk& chunk) {
    const std::int64_t done = align_down(chunk.got, chunk.cut.file->alignment());
    channel_->submit({chunk.cut.file, chunk.cut.begin + done,
                      std::span(chunk.into + done, static_cast<std::size_t>(chunk.cut.length - done)),
                      static_cast<std::size_t>(&chunk - chunks_.data())});
}

void RecordPump::arrived(Chunk& chunk, std::int64_t result) {
    if (result == -EINTR || result == -EAGAIN) return request(chunk);
    if (result < 0) {
        fail(chunk, std::generic_category().message(static_cast<int>(-result)));
    } else {
        const std::int64_t got = align_down(chunk.got, chunk.cut.file->alignment()) + result;
        if (chunk.cut.begin + got >= chunk.cut.last) {
            if (!chunk.cut.file->change().empty()) {
                fail(chunk, "");
            } else if (chunk.cut.straight == nullptr) {
                landed_ = &chunk;
                return;
            }
        } else if (got > chunk.got) {
            chunk.got = got;
            return request(chunk);
        } else {  // nothing new came: the end of the file
            fail(chunk, "");
        }
    }
    release(chunk);
}

void RecordPump::release(Chunk& chunk) {
    --chunk.job->in_flight;
    chunk.job = nullptr;
}

void RecordPump::scatter_chunk(const Chunk& chunk) {
    const std::vector<Segment>& segments = chunk.job->record->extents[chunk.cut.extent].segments;
    for (std::size_t i = chunk.cut.segment; i < segments.size() && segments[i].offset < chunk.cut.last; ++i) {
        const Segment& segment = segments[i];
        const std::int64_t from = std::max(segment.offset, chunk.cut.first);
        const std::int64_t to = std::min(segment.end(), chunk.cut.last);
        const std::byte* source = chunk.into + (from - chunk.cut.begin);
        std::byte* place = chunk.job->slot.data() + segment.dst_offset;
        if (segment.plain) {
            std::memcpy(place + (from - segment.offset), source, static_cast<std::size_t>(to - from));
        } else {
            const Encoding encoding = encoding_of(segment.layout.src_dtype);
            scatter(segment.layout, encoding.blocks(from - segment.offset), encoding.blocks(to - from), source, place);
        }
    }
}

// The first failure of a job is the one reported. `why` is empty at the end of the file, and where the file has
// changed.
void RecordPump::fail(const Chunk& chunk, const std::string& why) {
    Job& job = *chunk.job;
    const File& file = *chunk.cut.file;
    const std::string change = why.empty() ? file.change() : "";
    if (!change.empty()) files_.doubt(file);
    if (job.error) return;
    const std::int64_t at = why.empty() ? std::max(chunk.cut.first, chunk.cut.begin + chunk.got) : chunk.cut.first;
    const Piece& piece = piece_at(*job.record, job.record->extents[chunk.cut.extent].file, at);
    const std::string range = std::to_string(piece.nbytes) + " bytes at offset " + std::to_string(piece.offset);
    std::string message = "reading " + file.path() + ", tensor '" + piece.tensor + "', " + range + ": " + why;
    if (!change.empty()) {
        message += "the file " + change;
    } else if (why.empty()) {
        message = file.path() + " is truncated: tensor '" + piece.tensor + "' needs " + range + ", the file has " +
                  std::to_string(file.size()) + " bytes";
    }
    job.error = Error(ErrorKind::kRead, message, file.path(), piece.tensor, piece.offset, piece.nbytes);
}

}  // namespace emoe
