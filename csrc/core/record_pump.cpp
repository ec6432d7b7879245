#include "core/record_pump.hpp"

#include <sys/mman.h>

#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <new>
#include <string>
#include <system_error>
#include <utility>

#include "core/slab.hpp"

namespace emoe {
namespace {

constexpr std::int64_t kStraightBytes = std::int64_t{4} << 20;   // one read straight into the slot
constexpr std::int64_t kWorthStraight = std::int64_t{64} << 10;  // less than this joins its neighbours in a bounce read

constexpr std::int64_t kSlack = std::int64_t{64} << 10;  // a rest up to this joins the chunk before it
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

const File& OpenFiles::get(std::int64_t id) {
    const std::lock_guard lock(mutex_);
    const auto index = static_cast<std::size_t>(id);
    if (index >= files_.size()) files_.resize(index + 1);
    if (!files_[index]) files_[index] = reader_->open(table_->path(id));
    return *files_[index];
}

RecordPump::RecordPump(std::unique_ptr<ReadChannel> channel, OpenFiles& files)
    : channel_(std::move(channel)), files_(files), chunks_(channel_->depth()) {
    free_all_chunks();
}

RecordPump::~RecordPump() { channel_.reset(); }  // before the buffers its reads may still write to

bool RecordPump::wants_more() const noexcept { return !free_.empty() && (jobs_.empty() || jobs_.back()->cut()); }

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
    try {
        const ReadResult result = channel_->next();
        arrived(chunks_[result.tag], result.result);
    } catch (const Error& error) {
        give_up(error);
    }
    fill();
    return finished();
}

void RecordPump::free_all_chunks() {
    free_.clear();
    for (std::size_t i = chunks_.size(); i > 0; --i) free_.push_back(i - 1);
}

std::int64_t RecordPump::slack() const {
    return align_down(std::min(kSlack, static_cast<std::int64_t>(channel_->chunk_bytes()) / 8), kPageBytes);
}

std::byte* RecordPump::bounce_buffer(const Chunk& chunk) {
    const std::size_t each = channel_->chunk_bytes() + static_cast<std::size_t>(slack());
    if (!bounce_) {
        void* memory = nullptr;
        if (::posix_memalign(&memory, kHugePage, chunks_.size() * each) != 0) throw std::bad_alloc();
        // Huge pages: pinning 4 KiB pages for a direct read costs as much as copying them. Advice only.
        ::madvise(memory, chunks_.size() * each, MADV_HUGEPAGE);
        bounce_.reset(static_cast<std::byte*>(memory));
    }
    return bounce_.get() + static_cast<std::size_t>(&chunk - chunks_.data()) * each;
}

void RecordPump::give_up(const Error& why) {
    channel_.reset();
    broken_ = why;
    for (const std::unique_ptr<Job>& job : jobs_) {
        if (!job->error) job->error = why;
        job->in_flight = 0;
    }
    free_all_chunks();
}

void RecordPump::fill() {
    while (!free_.empty() && !jobs_.empty() && !jobs_.back()->cut()) {
        Job& job = *jobs_.back();
        Chunk& chunk = chunks_[free_.back()];
        try {
            cut_chunk(job, chunk);
        } catch (const Error& error) {
            job.error = error;
            return;
        } catch (const std::bad_alloc&) {
            job.error = Error(ErrorKind::kTransfer, "no memory for a bounce buffer");
            return;
        }
        free_.pop_back();
        chunk.job = &job;
        ++job.in_flight;
        request(chunk);
    }
}

// Takes the next part of the job into `chunk` and moves the job's position behind it.
void RecordPump::cut_chunk(Job& job, Chunk& chunk) {
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
    chunk.straight = last > first;
    chunk.begin = align_down(first, alignment);
    if (chunk.straight) {
        chunk.into = place;
    } else {
        const auto capacity = static_cast<std::int64_t>(channel_->chunk_bytes());
        const std::int64_t end = extent.segments.back().end();
        last = end - chunk.begin <= capacity + slack() ? end : chunk.begin + capacity;
        for (std::size_t i = job.segment; i < extent.segments.size() && extent.segments[i].offset < last; ++i) {
            const Segment& each = extent.segments[i];
            const std::int64_t in_place = align_up(std::max(each.offset, first), alignment);
            if (in_place > first && in_place < last && each.end() - in_place >= kWorthStraight &&
                congruent(each, job.slot.data(), alignment)) {
                last = in_place;
            } else if (!each.plain && each.end() > last) {
                last -= (last - each.offset) % itemsize(each.layout.src_dtype);  // elements stay whole
            }
        }
        chunk.into = bounce_buffer(chunk);
    }
    chunk.file = &file;
    chunk.extent = job.extent;
    chunk.segment = job.segment;
    chunk.first = first;
    chunk.last = last;
    chunk.length = align_up(last, alignment) - chunk.begin;
    chunk.got = 0;

    job.position = last;
    while (job.segment < extent.segments.size() && extent.segments[job.segment].end() <= last) ++job.segment;
    if (job.segment < extent.segments.size()) {
        job.position = std::max(last, extent.segments[job.segment].offset);
    } else if (job.segment = 0; ++job.extent < job.record->extents.size()) {
        job.position = job.record->extents[job.extent].segments.front().offset;
    }
}

// Asks for what is missing, from the last aligned position before it.
void RecordPump::request(Chunk& chunk) {
    const std::int64_t done = align_down(chunk.got, chunk.file->alignment());
    channel_->submit({chunk.file, chunk.begin + done,
                      std::span(chunk.into + done, static_cast<std::size_t>(chunk.length - done)),
                      static_cast<std::size_t>(&chunk - chunks_.data())});
}

void RecordPump::arrived(Chunk& chunk, std::int64_t result) {
    if (result == -EINTR || result == -EAGAIN) return request(chunk);
    if (result < 0) {
        fail(chunk, std::generic_category().message(static_cast<int>(-result)));
    } else {
        const std::int64_t got = align_down(chunk.got, chunk.file->alignment()) + result;
        if (chunk.begin + got >= chunk.last) {
            if (!chunk.straight && !chunk.job->error) scatter_chunk(chunk);
        } else if (got > chunk.got) {
            chunk.got = got;
            return request(chunk);
        } else {  // nothing new came: the end of the file
            fail(chunk, "");
        }
    }
    --chunk.job->in_flight;
    chunk.job = nullptr;
    free_.push_back(static_cast<std::size_t>(&chunk - chunks_.data()));
}

void RecordPump::scatter_chunk(const Chunk& chunk) {
    const std::vector<Segment>& segments = chunk.job->record->extents[chunk.extent].segments;
    for (std::size_t i = chunk.segment; i < segments.size() && segments[i].offset < chunk.last; ++i) {
        const Segment& segment = segments[i];
        const std::int64_t from = std::max(segment.offset, chunk.first);
        const std::int64_t to = std::min(segment.end(), chunk.last);
        const std::byte* source = chunk.into + (from - chunk.begin);
        std::byte* place = chunk.job->slot.data() + segment.dst_offset;
        if (segment.plain) {
            std::memcpy(place + (from - segment.offset), source, static_cast<std::size_t>(to - from));
        } else {
            const std::int64_t size = itemsize(segment.layout.src_dtype);
            scatter(segment.layout, (from - segment.offset) / size, (to - from) / size, source, place);
        }
    }
}

// The first failure of a job is the one reported. `why` is empty at the end of the file.
void RecordPump::fail(const Chunk& chunk, const std::string& why) {
    Job& job = *chunk.job;
    if (job.error) return;
    const std::int64_t at = why.empty() ? std::max(chunk.first, chunk.begin + chunk.got) : chunk.first;
    const Piece& piece = piece_at(*job.record, job.record->extents[chunk.extent].file, at);
    const std::string range = std::to_string(piece.nbytes) + " bytes at offset " + std::to_string(piece.offset);
    const std::string& path = chunk.file->path();
    const std::string message = why.empty()
                                    ? path + " is truncated: tensor '" + piece.tensor + "' needs " + range +
                                          ", the file has " + std::to_string(chunk.file->size()) + " bytes"
                                    : "reading " + path + ", tensor '" + piece.tensor + "', " + range + ": " + why;
    job.error = Error(ErrorKind::kRead, message, path, piece.tensor, piece.offset, piece.nbytes);
}

}  // namespace emoe
