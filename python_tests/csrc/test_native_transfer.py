"""The transfer queue through `emoe._C`, over every reader: bytes against torch, calls against a model, faults."""

from __future__ import annotations

import ctypes
import errno
import gc
import itertools
import os
import threading
import time
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from emoe import native
from emoe.errors import (
    BackendUnavailable,
    BudgetError,
    CancelledError,
    ClosedError,
    ConfigError,
    QueueFullError,
    ReadError,
    TransferError,
)

C = native.load()
READERS = [(kind, direct) for kind in ("pread", "uring") for direct in (True, False)]
FLOATS = ("float32", "float16", "bfloat16")
OTHERS = ("int8", "uint8", "bool", "int16", "int32", "int64", "float64", "float8_e4m3fn", "float8_e5m2")
QUICK = settings(max_examples=60)


@pytest.fixture(params=READERS, ids=[f"{kind}-{'direct' if direct else 'buffered'}" for kind, direct in READERS])
def reader(request: pytest.FixtureRequest) -> Any:
    kind, direct = request.param
    try:
        return C.make_reader(kind, direct)
    except BackendUnavailable as error:
        pytest.skip(f"reader {kind}: {error}")


@pytest.fixture(scope="module")
def shard(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, np.ndarray]:
    """A file of random bytes, and these bytes."""
    data = np.random.default_rng(0).integers(0, 256, 3_000_001, dtype=np.uint8)
    path = tmp_path_factory.mktemp("shards") / "shard.bin"
    data.tofile(path)
    return path, data


def slot_bytes(slab: Any, slot: int) -> np.ndarray:
    """A copy of a slot's bytes; the slab has to be alive."""
    buffer = (ctypes.c_uint8 * slab.slot_bytes).from_address(slab.address + slot * slab.slot_bytes)
    return np.frombuffer(buffer, np.uint8).copy()


def plain(file: int, offset: int, nbytes: int, dst: int = 0, tensor: str = "t") -> tuple[Any, ...]:
    return (file, offset, nbytes, tensor, "uint8", dst, "uint8", 1, nbytes, nbytes, 1)


class Setup:
    """A queue over one file whose record r is `nbytes` bytes at offset 8 + r * nbytes."""

    def __init__(self, path: Path, reader: Any, *, records: int = 8, nbytes: int = 10_000, **options: Any) -> None:
        self.table = C.RecordTable()
        file = self.table.add_file(str(path))
        self.records = [self.table.add_record([plain(file, 8 + r * nbytes, nbytes)]) for r in range(records)]
        self.nbytes = nbytes
        self.slab = C.Slab(records, nbytes)
        self.queue = C.TransferQueue(self.slab, self.table, reader, **options)

    def holds(self, slot: int, record: int, data: np.ndarray) -> bool:
        start = 8 + record * self.nbytes
        return np.array_equal(slot_bytes(self.slab, slot)[: self.nbytes], data[start : start + self.nbytes])


def test_a_slab_rounds_slots_up_to_pages_and_starts_zeroed():
    slab = C.Slab(slots=3, slot_bytes=5000)
    assert (slab.slots, slab.slot_bytes, slab.address % 4096) == (3, 8192, 0)
    assert not slot_bytes(slab, 2).any()
    for slots, size in ((0, 1), (1, 0), (-1, 5)):
        with pytest.raises(ConfigError):
            C.Slab(slots, size)
    with pytest.raises(BudgetError):
        C.Slab(1 << 20, 1 << 40)


def test_readers_are_chosen_by_name_and_say_what_they_are():
    with pytest.raises(ConfigError, match="'mmap' is not one of: auto, uring, pread"):
        C.make_reader("mmap")
    reader = C.make_reader()
    assert reader.name in ("uring", "pread") and (reader.name == "uring") == (reader.note == "")
    assert C.make_reader("pread", direct=False).direct is False
    assert C.FaultyReader(C.make_reader("pread")).name == "faulty pread"


def reference(data: np.ndarray, piece: tuple[Any, ...], slot: torch.Tensor) -> None:
    """Puts a piece into `slot` (uint8) the slow way."""
    _, offset, nbytes, _, src, dst_offset, dst, rows, cols, row_stride, col_stride = piece
    source = torch.from_numpy(data[offset : offset + nbytes].copy()).view(getattr(torch, src)).reshape(rows, cols)
    values = source if src == dst else source.to(getattr(torch, dst))
    size = values.element_size()
    raw = values.contiguous().view(torch.uint8).reshape(rows, cols, size)
    for r, c in itertools.product(range(rows), range(cols)):
        at = dst_offset + (r * row_stride + c * col_stride) * size
        slot[at : at + size] = raw[r, c]


@st.composite
def pieces(draw: st.DrawFn) -> list[tuple[Any, ...]]:
    """Pieces whose places in the slot do not overlap, at any offsets in the file."""
    result = []
    place = draw(st.integers(0, 50)) * 8
    offset = draw(st.one_of(st.integers(0, 10_000), st.integers(0, 20).map(lambda n: n * 4096)))
    for _ in range(draw(st.integers(1, 4))):
        src = draw(st.sampled_from(FLOATS + OTHERS))
        dst = draw(st.sampled_from(FLOATS)) if src in FLOATS else src
        rows, cols = draw(st.integers(1, 12)), draw(st.integers(1, 40))
        row_stride, col_stride = draw(st.sampled_from([(cols, 1), (2 * cols + 1, 1), (1, rows), (2, 2 * rows)]))
        nbytes = rows * cols * torch.empty(0, dtype=getattr(torch, src)).element_size()
        result.append((0, offset, nbytes, "t", src, place, dst, rows, cols, row_stride, col_stride))
        place += ((rows - 1) * row_stride + (cols - 1) * col_stride + 1) * 8 + draw(st.integers(0, 9))
        offset += nbytes + draw(st.sampled_from([0, 0, 3, 5000, 400_000]))
    return result


@QUICK
@given(record=pieces())
def test_any_pieces_land_where_torch_would_put_them(reader, shard, record):
    path, data = shard
    table = C.RecordTable()
    table.add_file(str(path))
    number = table.add_record(record)
    assert table.record_bytes(number) == sum(piece[2] for piece in record)
    slab = C.Slab(1, 64 << 10)
    queue = C.TransferQueue(slab, table, reader)
    queue.wait(queue.submit(number, 0))
    expected = torch.zeros(slab.slot_bytes, dtype=torch.uint8)
    for piece in record:
        reference(data, piece, expected)
    assert same_elements(torch.from_numpy(slot_bytes(slab, 0)), expected, record)
    queue.close()


def _size(dtype: str) -> int:
    return torch.empty(0, dtype=getattr(torch, dtype)).element_size()


def same_elements(got: torch.Tensor, expected: torch.Tensor, record: list[tuple[Any, ...]]) -> bool:
    """Same bits for every element of the record; where a conversion meets a NaN, any NaN will do."""
    for _, _, _, _, src, dst_offset, dst, rows, cols, row_stride, col_stride in record:
        size = _size(dst)
        where = [dst_offset + (r * row_stride + c * col_stride) * size for r in range(rows) for c in range(cols)]
        index = torch.tensor(where)[:, None] + torch.arange(size)
        a, b = got[index].contiguous(), expected[index].contiguous()
        same = (a == b).all(1)
        if src != dst:
            both = [x.view(getattr(torch, dst)).float().isnan().flatten() for x in (a, b)]
            same |= both[0] & both[1]
        if not bool(same.all()):
            return False
    return True


def test_large_experts_arrive_whole_whatever_their_alignment(reader, tmp_path):
    data = np.random.default_rng(1).integers(0, 256, 24 << 20, dtype=np.uint8)
    path = tmp_path / "shard.bin"
    data.tofile(path)
    table = C.RecordTable()
    file = table.add_file(str(path))
    part = 3 << 20
    whole = [(4096, 9 << 20), (1003, 9 << 20), (0, (9 << 20) - 77), ((24 << 20) - 5_000_003, 5_000_003)]
    records = [table.add_record([plain(file, *place)]) for place in whole]
    apart = table.add_record([plain(file, 8 + i * (7 << 20), part, i * part) for i in range(3)])
    slab = C.Slab(5, 9 << 20)
    queue = C.TransferQueue(slab, table, reader)
    tickets = [queue.submit(record, slot) for slot, record in enumerate([*records, apart])]
    for ticket in tickets:
        queue.wait(ticket)
    for slot, (offset, nbytes) in enumerate(whole):
        assert np.array_equal(slot_bytes(slab, slot)[:nbytes], data[offset : offset + nbytes])
    for i in range(3):
        start = 8 + i * (7 << 20)
        assert np.array_equal(slot_bytes(slab, 4)[i * part : (i + 1) * part], data[start : start + part])
    stats = queue.stats()
    assert stats["demand_bytes"] == sum(nbytes for _, nbytes in whole) + 3 * part
    assert stats["demand_jobs"] == 5 and stats["reader"] == reader.name and stats["read_seconds"] > 0


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({0: 7}, "file id 7"),
        ({2: 11}, "nbytes=11"),
        ({4: "float33"}, "'float33' is not one of: float32"),
        ({4: "int32"}, "no conversion from int32 to float16"),
        ({5: -1}, "dst_offset_bytes=-1"),
        ({7: 0}, "no elements"),
        ({9: -2}, "dst_row_stride=-2"),
    ],
)
def test_a_piece_that_contradicts_itself_is_refused(shard, change, says):
    table = C.RecordTable()
    table.add_file(str(shard[0]))
    good = [0, 0, 24, "gate", "float32", 0, "float16", 2, 3, 3, 1]
    table.add_record([tuple(good)])
    for index, value in change.items():
        good[index] = value
    with pytest.raises(ConfigError, match=says):
        table.add_record([tuple(good)])


def test_files_and_records_that_do_not_exist_are_refused(reader, shard):
    with pytest.raises(ReadError, match="No such file") as missing:
        C.RecordTable().add_file("/nonexistent/shard")
    assert missing.value.file == "/nonexistent/shard"
    setup = Setup(shard[0], reader, records=2)
    for record, slot in ((2, 0), (-1, 0), (0, 2), (0, -1)):
        with pytest.raises(ConfigError):
            setup.queue.submit(record, slot)
    with pytest.raises(ConfigError, match="needs a slot of 20000 bytes"):
        setup.queue.submit(setup.table.add_record([plain(0, 0, 20_000)]), 0)
    for options in ({"workers": 0}, {"workers": 65}, {"prefetch_bytes": -1}):
        with pytest.raises(ConfigError):
            Setup(shard[0], reader, **options)


def _numbers(tmp_path: Path) -> tuple[Path, np.ndarray]:
    path = tmp_path / "numbers"
    data = np.random.default_rng(1).integers(0, 256, 100_000, dtype=np.uint8)
    data.tofile(path)
    return path, data


@pytest.mark.parametrize("queued_before", [True, False])
def test_a_file_that_lost_its_name_after_it_was_added_is_read_on(reader, tmp_path, queued_before):
    path, data = _numbers(tmp_path)
    table = C.RecordTable()
    record = table.add_record([plain(table.add_file(str(path)), 8, 10_000)])
    slab = C.Slab(1, 10_000)
    queue = C.TransferQueue(slab, table, reader) if queued_before else None
    path.unlink()
    path.write_bytes(bytes(100_000))
    queue = queue or C.TransferQueue(slab, table, reader)
    queue.wait(queue.submit(record, 0))
    assert np.array_equal(slot_bytes(slab, 0)[:10_000], data[8:10_008])


def test_a_descriptor_is_duplicated_and_its_identity_compared(reader, tmp_path):
    path, data = _numbers(tmp_path)
    fd = os.open(path, os.O_RDONLY)
    info = os.fstat(fd)
    identity = (info.st_dev, info.st_ino, info.st_size, info.st_mtime_ns)
    table = C.RecordTable()
    record = table.add_record([plain(table.add_file("the name in messages", fd, identity), 8, 10_000)])
    for wrong in range(4):
        other = tuple(value + (i == wrong) for i, value in enumerate(identity))
        with pytest.raises(ReadError, match="changed since the model was loaded") as caught:
            table.add_file(str(path), fd, other)
        assert caught.value.file == str(path)
    os.close(fd)
    slab = C.Slab(1, 10_000)
    queue = C.TransferQueue(slab, table, reader)
    queue.wait(queue.submit(record, 0))
    assert np.array_equal(slot_bytes(slab, 0)[:10_000], data[8:10_008])
    with path.open("r+b") as stream:
        stream.write(b"x")
    with pytest.raises(ReadError, match=r"the name in messages.*it was written to"):
        queue.wait(queue.submit(record, 0))


def test_what_is_no_regular_file_is_refused_and_never_waited_for(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path / "fifo", tmp_path, Path("/dev/zero")):
        with pytest.raises(ReadError, match="no regular file"):
            C.RecordTable().add_file(str(path))


def test_a_truncated_file_is_a_read_error_that_says_what_was_wanted_and_what_is_there(reader, tmp_path):
    path = tmp_path / "shard"
    path.write_bytes(bytes(25_000))
    table = C.RecordTable()
    file = table.add_file(str(path))
    record = table.add_record([plain(file, 100, 10_000, 0, "up"), plain(file, 20_000, 6_000, 10_000, "down")])
    slab = C.Slab(1, 16_000)
    queue = C.TransferQueue(slab, table, reader)
    ticket = queue.submit(record, 0)
    with pytest.raises(
        ReadError, match=r"truncated: tensor 'down' needs 6000 bytes at offset 20000, .* has 25000"
    ) as caught:
        queue.wait(ticket)
    error = caught.value
    assert (error.file, error.tensor, error.offset, error.nbytes) == (str(path), "down", 20_000, 6_000)
    assert queue.done(ticket) and queue.stats()["failed"] == 1
    path.write_bytes(bytes(26_000))
    with pytest.raises(ReadError, match=r"changed since the model was loaded .it had 25000 bytes, now 26000."):
        queue.wait(queue.submit(record, 0))


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOMEM])
def test_an_error_of_the_disk_names_file_tensor_and_bytes_and_a_second_attempt_works(reader, shard, number):
    path, data = shard
    setup = Setup(path, C.FaultyReader(reader, fail_at=0, errno=number), workers=1)
    bad = setup.queue.submit(3, 0)
    good = setup.queue.submit(4, 1)
    setup.queue.wait(good)
    with pytest.raises(ReadError) as caught:
        setup.queue.wait(bad)
    error = caught.value
    assert (error.file, error.tensor, error.offset, error.nbytes) == (str(path), "t", 30_008, 10_000)
    assert isinstance(error, OSError)
    setup.queue.wait(setup.queue.submit(3, 0))
    assert setup.holds(0, 3, data) and setup.holds(1, 4, data)


@pytest.mark.parametrize("fault", [{"fail_at": 0, "errno": errno.EINTR}, {"short_at": 0}, {"short_at": 1}])
def test_interrupted_and_short_reads_are_taken_up_again(reader, shard, fault):
    path, data = shard
    setup = Setup(path, C.FaultyReader(reader, **fault))
    for slot in range(3):
        setup.queue.wait(setup.queue.submit(slot + 2, slot))
        assert setup.holds(slot, slot + 2, data)
    assert setup.queue.stats()["failed"] == 0


def test_a_prefetch_past_the_bound_is_refused_and_demands_are_not(reader, shard):
    setup = Setup(shard[0], reader, prefetch_bytes=9_999)
    with pytest.raises(QueueFullError, match="passes the bound of 9999"):
        setup.queue.submit(0, 0, prefetch=True)
    setup.queue.wait(setup.queue.submit(0, 0))
    setup = Setup(shard[0], reader, prefetch_bytes=10_000)
    for slot in range(3):
        setup.queue.wait(setup.queue.submit(slot, slot, True))
    assert setup.queue.stats()["prefetch_bytes"] == 30_000


def test_waiting_releases_the_gil(reader, shard):
    setup = Setup(shard[0], C.FaultyReader(reader, delay_ms=300), workers=1)
    seen = False
    for _ in range(20):  # again only where the machine kept this thread waiting for longer than the read takes
        ticket = setup.queue.submit(0, 0)
        begun = threading.Event()
        waiter = threading.Thread(
            target=lambda ticket, begun: (begun.set(), setup.queue.wait(ticket)), args=(ticket, begun)
        )
        waiter.start()
        begun.wait()
        time.sleep(0.02)  # a waiter that kept the GIL would end this sleep, and give it back when the read is done
        seen = not setup.queue.done(ticket)
        waiter.join()
        assert setup.queue.done(ticket)
        if seen:
            break
    assert seen


def test_closing_cancels_what_is_queued_and_refuses_what_comes_later(reader, shard):
    path, data = shard
    setup = Setup(path, C.FaultyReader(reader, delay_ms=300), workers=1, records=20)
    tickets = [setup.queue.submit(slot, slot, prefetch=slot % 2 == 1) for slot in range(20)]
    setup.queue.close()
    setup.queue.close()
    ends = []
    for slot, ticket in enumerate(tickets):
        assert setup.queue.done(ticket)
        try:
            setup.queue.wait(ticket)
            ends.append("ready")
            assert setup.holds(slot, slot, data)
        except CancelledError:
            ends.append("cancelled")
            assert not slot_bytes(setup.slab, slot).any()
    assert "cancelled" in ends
    with pytest.raises(ClosedError):
        setup.queue.submit(0, 0)


def test_a_closed_queue_gives_its_slab_and_files_back(reader, shard):
    gc.collect()  # what other tests left
    before = _descriptors(shard[0])
    setup = Setup(shard[0], reader)
    setup.queue.wait(setup.queue.submit(0, 0))
    assert _descriptors(shard[0]) == before + 1 + reader.direct  # the table's own, and one for O_DIRECT
    queue, address = setup.queue, setup.slab.address
    gone = weakref.finalize(setup, lambda: None)
    queue.close()
    del setup
    gc.collect()
    assert not gone.alive
    assert _descriptors(shard[0]) == before
    assert not _mapped(address)
    assert queue.stats()["demand_jobs"] == 1


def _descriptors(path: Path) -> int:
    count = 0
    for link in Path("/proc/self/fd").iterdir():
        try:
            count += link.readlink() == path
        except OSError:  # the listing's own descriptor
            continue
    return count


def _mapped(address: int) -> bool:
    for line in Path("/proc/self/maps").read_text().splitlines():
        start, end = (int(part, 16) for part in line.split()[0].split("-"))
        if start <= address < end:
            return True
    return False


def test_a_queue_that_is_dropped_while_it_works_ends_quietly(reader, shard):
    for _ in range(5):
        setup = Setup(shard[0], reader)
        for slot in range(8):
            setup.queue.submit(slot, slot, prefetch=slot > 3)
        del setup


def test_threads_may_share_a_queue(reader, shard):
    path, data = shard
    setup = Setup(path, C.FaultyReader(reader, fail_at=17), records=24, workers=3)
    wrong: list[str] = []
    failed: list[int] = []

    def user(thread: int) -> None:
        rng = np.random.default_rng(thread)
        for _ in range(30):
            slots = [thread * 4 + i for i in range(4)]
            records = rng.integers(0, 24, 4)
            tickets = [
                setup.queue.submit(int(r), s, bool(rng.integers(2))) for r, s in zip(records, slots, strict=True)
            ]
            cancelled = setup.queue.cancel(tickets[3]) if rng.integers(2) else False
            setup.queue.promote(tickets[0])
            for ticket, record, slot in zip(tickets, records, slots, strict=True):
                try:
                    setup.queue.wait(ticket)
                    if not setup.holds(slot, int(record), data):
                        wrong.append(f"slot {slot} does not hold record {record}")
                except CancelledError:
                    if not (cancelled and ticket == tickets[3]):
                        wrong.append(f"ticket {ticket} was not cancelled by anyone")
                except ReadError:
                    failed.append(ticket)

    threads = [threading.Thread(target=user, args=(thread,)) for thread in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert len(failed) == setup.queue.stats()["failed"] <= 1
    assert setup.queue.stats()["queued"] == 0


class Model:
    """What tickets may say. A call that does not apply now is skipped, so that draws do not depend on timing."""

    SLOTS, RECORDS, NBYTES, BOUND = 5, 10, 9_000, 20_000

    def __init__(self, reader: Any, path: Path, data: np.ndarray) -> None:
        self.data = data
        faulty = C.FaultyReader(reader, fail_at=5, short_at=3)
        self.setup = Setup(path, faulty, records=self.RECORDS, nbytes=self.NBYTES, prefetch_bytes=self.BOUND)
        self.queue = self.setup.queue
        self.busy: dict[int, tuple[int, int, str]] = {}  # ticket -> slot, record, "?" | "cancelled"
        self.forgotten: list[int] = []
        self.failed = self.cancelled = self.ready = 0

    def pick(self, index: int) -> int:
        return list(self.busy)[index % len(self.busy)]

    def submit(self, index: int, prefetch: bool) -> None:
        slots = sorted(set(range(self.SLOTS)) - {slot for slot, _, _ in self.busy.values()})
        if not slots:
            return
        slot, record = slots[index % len(slots)], index % self.RECORDS
        try:
            ticket = self.queue.submit(record, slot, prefetch)
        except QueueFullError:
            assert prefetch and len(self.busy) >= 2
            return
        assert ticket not in self.busy and ticket not in self.forgotten
        self.busy[ticket] = (slot, record, "?")

    def promote(self, index: int) -> None:
        if self.busy:
            self.queue.promote(self.pick(index))

    def cancel(self, index: int) -> None:
        if not self.busy:
            return
        ticket = self.pick(index)
        slot, record, state = self.busy[ticket]
        if self.queue.cancel(ticket):
            assert state == "?" and self.queue.done(ticket)
            self.busy[ticket] = (slot, record, "cancelled")
            self.cancelled += 1

    def wait(self, index: int) -> None:
        if not self.busy:
            return
        ticket = self.pick(index)
        slot, record, state = self.busy.pop(ticket)
        self.forgotten.append(ticket)
        try:
            self.queue.wait(ticket)
        except CancelledError:
            assert state == "cancelled"
        except ReadError:
            self.failed += 1
            assert state == "?" and self.failed == 1
        else:
            assert state == "?" and self.setup.holds(slot, record, self.data)
            self.ready += 1

    def use_forgotten(self, index: int) -> None:
        if not self.forgotten:
            return
        ticket = self.forgotten[index % len(self.forgotten)]
        with pytest.raises(TransferError):
            self.queue.wait(ticket)
        assert self.queue.done(ticket) and not self.queue.cancel(ticket)
        self.queue.promote(ticket)

    def finish(self) -> None:
        while self.busy:
            self.wait(0)
        stats = self.queue.stats()
        self.queue.close()
        assert stats["demand_jobs"] + stats["prefetch_jobs"] == self.ready
        assert stats["demand_bytes"] + stats["prefetch_bytes"] == self.ready * self.NBYTES
        assert (stats["failed"], stats["cancelled"], stats["queued"]) == (self.failed, self.cancelled, 0)


CALLS = ("demand", "demand", "prefetch", "prefetch", "promote", "cancel", "wait", "wait", "use_forgotten")


@QUICK
@given(calls=st.lists(st.tuples(st.sampled_from(CALLS), st.integers(0, 99)), min_size=5, max_size=60))
def test_random_calls_agree_with_a_model_of_the_queue(reader, shard, calls):
    model = Model(reader, *shard)
    try:
        for call, index in calls:
            if call in ("demand", "prefetch"):
                model.submit(index, call == "prefetch")
            else:
                getattr(model, call)(index)
    finally:
        model.finish()
