"""The native core: slots, transfers and kernels. Addresses, shapes and streams are int (stream 0 is the default one).

This is the module's reference; python_tests/csrc/test_stub.py compares it with the module. Errors are those of
emoe.errors, with file, tensor, offset and nbytes where they are about bytes of a file.
"""

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from numpy.typing import NDArray

# A byte range of a file that is a row-major [rows, cols] array; where its elements land: docs/transfer.md.
# (file_id, offset, nbytes, tensor, src_dtype, dst_offset_bytes, dst_dtype, rows, cols, dst_row_stride, dst_col_stride)
Piece: TypeAlias = tuple[int, int, int, str, str, int, str, int, int, int, int]
# (device, inode, size, mtime_ns)
Identity: TypeAlias = tuple[int, int, int, int]

# Transfers: docs/transfer.md

class Slab:
    """One allocation cut into equal slots: an anonymous mapping, or device memory."""

    def __init__(self, slots: int, slot_bytes: int) -> None: ...
    @property
    def address(self) -> int: ...
    @property
    def slots(self) -> int: ...
    @property
    def slot_bytes(self) -> int:
        """Bytes of one slot: what was asked for, rounded up to 4096."""

class NextUse:
    """Which experts of one layer will be used soon, learned from its picks (csrc/core/next_use.hpp)."""

    def __init__(self) -> None: ...
    def saw(self, picks: Any) -> None:
        """Int64 [tokens, top_k] of a step; ids below 0 or over 65535 are no picks. As many tokens as in the last step,
        and more than one: a batch of texts, one token whose picks are those of all. ConfigError.
        """
    def least(self, experts: Sequence[int]) -> int:
        """Of these the one least likely to be used soon, the first of equals. ConfigError where there is none."""
    def scores(self, experts: int) -> Any:
        """Float32 of experts 0 to `experts` - 1; the higher, the sooner."""
    @property
    def bytes(self) -> int:
        """What was learned takes so many."""

class RecordTable:
    """Where experts lie in files."""

    def __init__(self) -> None: ...
    def add_file(self, path: str, fd: int | None = None, identity: Identity | None = None) -> int:
        """Returns the id of the file, which stays open. `fd`: duplicated in place of opening the path; `identity`:
        (device, inode, size, mtime_ns) that it has to have, now and after every read (None: as it is now). ReadError,
        also where it is no regular file.
        """
    def add_record(self, pieces: Sequence[Piece]) -> int:
        """Returns the id of the record. ConfigError."""
    def record_bytes(self, record_id: int) -> int:
        """Bytes to be read from files."""

class Reader:
    """Reads bytes from files; see make_reader."""

    @property
    def name(self) -> str: ...
    @property
    def direct(self) -> bool:
        """False once a file system has refused O_DIRECT."""
    @property
    def note(self) -> str:
        """Why it is not what was preferred, or ""."""

def make_reader(kind: str = "auto", direct: bool = True) -> Reader:
    """A reader: "auto", "uring" or "pread". Logs where auto falls back. ConfigError; BackendUnavailable."""

def FaultyReader(reader: Reader, *, fail_at: int = -1, errno: int = 5, short_at: int = -1, delay_ms: int = 0) -> Reader:
    """For tests: read number `fail_at` (from 0, over all workers) fails, number `short_at` gives half its bytes."""

class TransferQueue:
    """Fills slots with records in the background; goes on in a child of fork(), under the same tickets."""

    def __init__(
        self, slab: Slab, table: RecordTable, reader: Reader, *, workers: int = 2, prefetch_bytes: int = 64 << 20
    ) -> None: ...
    def submit(self, record: int, slot: int, prefetch: bool = False) -> int:
        """Returns a ticket, to be waited for once; never blocks. QueueFullError where a prefetch passes
        `prefetch_bytes`. Jobs of a lane run in order of submission; demand overtakes queued prefetches.
        """
    def promote(self, ticket: int) -> None:
        """A queued prefetch becomes a demand; nothing happens to one that runs or is over."""
    def cancel(self, ticket: int) -> bool:
        """True: it never ran and its slot was not touched."""
    def ticket_of(self, slot: int) -> int | None:
        """The newest ticket submitted for the slot and not waited for; None: nothing will write to it."""
    def done(self, ticket: int) -> bool:
        """True when over in any way; never blocks."""
    def wait(self, ticket: int) -> None:
        """Returns when the slot holds the record, and forgets the ticket; releases the GIL. ReadError, CancelledError;
        TransferError where it was waited for before.
        """
    def stats(self) -> dict[str, Any]:
        """demand_bytes, prefetch_bytes, demand_jobs, prefetch_jobs, cancelled, failed, read_seconds, wait_seconds,
        reader, queued.
        """
    def close(self) -> None:
        """Finishes running jobs, cancels the rest; idempotent."""

# Kernels: docs/kernels.md

def isa() -> str:
    """The instruction set in use."""

def available_isas() -> list[str]:
    """What this CPU can run, best first: of "avx512bf16", "avx512", "avx2", "scalar"."""

def set_threads(n: int) -> None:
    """Threads of the kernels, for the whole process, from the next call on; ConfigError unless 1 to 1024."""

def threads() -> int:
    """What was set, else EMOE_THREADS, else OMP_NUM_THREADS, else the CPUs that affinity and cgroup quota leave.

    ConfigError where EMOE_THREADS is no number from 1 to 1024.
    """

class Weights:
    """A matrix of an expert, encoded; planes and bias at bytes of its slot. Row r is row `first + r * step` of `rows`.

    ConfigError where codes, planes, scales and sizes do not fit each other.
    """

    def __init__(
        self,
        *,
        codes: str,
        rows: int,
        depth: int,
        first: int,
        step: int,
        count: int,
        planes: Mapping[str, int],
        scale: str,
        scale_block: tuple[int, int],
        bias: tuple[int, int, str] | None = None,
    ) -> None:
        """`codes`, `planes`, `scale`: emoe/model/encoding.py. `scale_block`: rows and columns that share a scale, 0 for
        all. `bias`: byte of the first row's, elements from one row to the next, dtype.
        """
    @property
    def extent(self) -> int:
        """Bytes of the smallest slot that holds its arrays."""
    def expand(self, slot_address: int, row: int, first: int, last: int) -> NDArray[Any]:
        """Columns [first, last) of a row, float32: the reference of the kernels, slow."""

class MlpLayout:
    """How one expert's tensors lie in a slot; offsets in bytes, -1: no bias."""

    def __init__(
        self,
        hidden: int,
        intermediate: int,
        hidden_out: int,
        dtype: str,
        has_gate: bool,
        interleaved: bool,
        transposed: bool,
        activation: str,
        *,
        gate_up_offset: int,
        down_offset: int,
        alpha: float = 1.702,
        limit: float = 0.0,
        gate_up_bias_offset: int = -1,
        down_bias_offset: int = -1,
    ) -> None: ...
    @staticmethod
    def encoded(
        *,
        hidden: int,
        intermediate: int,
        hidden_out: int,
        has_gate: bool,
        interleaved: bool,
        activation: str,
        gate: Weights,
        down: Weights,
        up: Weights | None = None,
        alpha: float = 1.702,
        limit: float = 0.0,
    ) -> MlpLayout:
        """The layout of an expert whose matrices are encoded."""
    @property
    def hidden(self) -> int: ...
    @property
    def intermediate(self) -> int: ...
    @property
    def hidden_out(self) -> int: ...
    @property
    def has_gate(self) -> bool: ...
    @property
    def interleaved(self) -> bool: ...
    @property
    def transposed(self) -> bool: ...
    @property
    def alpha(self) -> float: ...
    @property
    def limit(self) -> float: ...
    @property
    def gate_up_offset(self) -> int: ...
    @property
    def gate_up_bias_offset(self) -> int: ...
    @property
    def down_offset(self) -> int: ...
    @property
    def down_bias_offset(self) -> int: ...
    @property
    def dtype(self) -> str: ...
    @property
    def activation(self) -> str: ...
    @property
    def slot_extent(self) -> int:
        """Bytes of the smallest slot that holds the layout."""

def supports(layout: MlpLayout) -> bool: ...
def gather_mlp(
    layout: MlpLayout,
    slab_address: int,
    slot_bytes: int,
    slot_of: NDArray[Any],
    hidden_ptr: int,
    hidden_dtype: str,
    tokens: int,
    index_ptr: int,
    weights_ptr: int,
    weights_dtype: str,
    top_k: int,
    out_ptr: int,
    mode: str,
) -> None:
    """Adds w[t, k] * mlp_e(x[t]) of every pair whose expert has a slot: docs/kernels.md has the arithmetic.

    `slot_of`: int32 [E], -1: not in this call. `index`: int64 [T, K]; ids outside [0, E) are skipped. `out`: float32,
    zero beforehand; mode "pairs": [T, K, H] at (t, rank of the id among the token's), "accumulate": added to [T, H];
    "sum": [T, H] of `hidden_dtype`, what `combine` makes of these pairs.
    """

def linear(
    weights: Weights,
    address: int,
    x_ptr: int,
    dtype: str,
    tokens: int,
    y_ptr: int,
    bias_ptr: int = 0,
    bias_dtype: str = "float32",
) -> None:
    """y [T, count] = x [T, depth] times the rows of `weights`, whose offsets count from `address`, plus a bias [count].

    x and y are of `dtype`; sums are float32 and rounded once. Up to 8 rows, each has the bits that it has alone.
    """

def attend(
    *,
    batch: int,
    heads: int,
    kv_heads: int,
    keys: int,
    depth: int,
    value_depth: int,
    dtype: str,
    scale: float,
    query_ptr: int,
    query_strides: tuple[int, int, int],
    key_ptr: int,
    key_strides: tuple[int, int, int],
    value_ptr: int,
    value_strides: tuple[int, int, int],
    mask_ptr: int,
    mask_strides: tuple[int, int, int],
    out_ptr: int,
) -> None:
    """Attention of one row of each sequence: docs/kernels.md has the arithmetic.

    query [batch, heads, depth], key [batch, kv_heads, keys, depth], value [batch, kv_heads, keys, value_depth], out
    [batch, heads, value_depth]; strides in elements, of sequence, head and key, those of a head follow each other.
    `mask_ptr`: bytes [batch, heads, keys], 0 where a key is not seen, or 0: all are.
    """

class AttentionBlock:
    """An attention block whose decode steps are one call; docs/kernels.md has the arithmetic.

    `query`, `key`, `value`, `out`: weights, their address, that of a bias or 0, its dtype. Norms: address of a weight,
    its width (of a head or of all), epsilon. All of it is to stay where it is.
    """

    def __init__(
        self,
        *,
        dtype: str,
        heads: int,
        kv_heads: int,
        depth: int,
        query: tuple[Weights, int, int, str],
        key: tuple[Weights, int, int, str],
        value: tuple[Weights, int, int, str],
        out: tuple[Weights, int, int, str],
        query_norm: tuple[int, int, float] | None = None,
        key_norm: tuple[int, int, float] | None = None,
    ) -> None: ...
    def step(
        self,
        batch: int,
        x_ptr: int,
        cos_ptr: int,
        sin_ptr: int,
        rotated: int,
        position_stride: int,
        keys: int,
        key_ptr: int,
        key_strides: tuple[int, int, int],
        value_ptr: int,
        value_strides: tuple[int, int, int],
        mask_ptr: int,
        mask_strides: tuple[int, int, int],
        scale: float,
        y_ptr: int,
    ) -> None:
        """y [batch, outputs] of x [batch, inputs]; writes row `keys` - 1 of keys and values [batch, kv_heads, keys,
        depth]. cos and sin [batch, rotated] are `position_stride` elements apart; masks are those of `attend`.
        """

def rms_norm(rows: int, width: int, dtype: str, epsilon: float, x_ptr: int, weight_ptr: int, out_ptr: int) -> None:
    """out [rows, width] = weight [width] * x / sqrt(mean(x^2) + epsilon), rounded to `dtype` before the product too."""

def combine(pairs_ptr: int, tokens: int, top_k: int, hidden_out: int, out_ptr: int, out_dtype: str) -> None:
    """Sums pairs [T, K, H] float32 over K in ascending order into [T, H]."""

def fit_affine(
    numbers_ptr: int, groups: int, size: int, most: int, first: float, steps: int, scale_ptr: int, offset_ptr: int
) -> None:
    """Scale and offset [groups] of numbers [groups, size], float32, with scale * code - offset near each and codes from
    0 to `most`; by the thread that calls (csrc/cpu/fit.hpp). ConfigError.
    """

def fit_symmetric(numbers_ptr: int, groups: int, size: int, most: int, squared: bool, scale_ptr: int) -> None:
    """Scale [groups] of numbers [groups, size], float32, with scale * code near each and codes from -most to most - 1;
    `squared`: numbers weigh their square, otherwise all the same. ConfigError.
    """

def read_seconds(address: int, nbytes: int) -> float:
    """Seconds to read `nbytes` once with every thread (benchmarks)."""

# A GPU: docs/cuda.md. A build without CUDA has cuda_status only.

def cuda_status() -> dict[str, Any]:
    """What of CUDA is here: built, architectures, runtime and driver (12080 for 12.8, 0: none), devices, and
    `problem`, "" where a device can be used.
    """

def cuda_refusal(layout: MlpLayout) -> str:
    """ "" where the GPU kernels take the layout, or why not."""

class CudaDevice:
    """One GPU: memory, copies, kernels. A slot may be given away once the kernels that read it are enqueued.

    BackendUnavailable in a child of fork().
    """

    def __init__(
        self,
        device: int = 0,
        *,
        piece_bytes: int = 4 << 20,
        demand_in_flight: int = 64 << 20,
        prefetch_in_flight: int = 8 << 20,
    ) -> None:
        """Copies go in pieces, of which a lane has so many bytes in flight. BackendUnavailable says which of driver,
        device, build is missing; ConfigError names the devices.
        """
    @property
    def index(self) -> int: ...
    def slab(self, slots: int, slot_bytes: int) -> Slab:
        """Slots in this device's memory. BudgetError names what is free."""
    def allocate(self, nbytes: int) -> int:
        """Address of cleared device memory."""
    def free(self, address: int) -> None:
        """Waits for what still uses it."""
    def upload(self, dst: int, src: int, nbytes: int, stream: int) -> None:
        """Host to device, through staging; `src` may change when it returns."""
    def write_table(self, table_ptr: int, slot_of: NDArray[Any], stream: int) -> None:
        """A layer's slot table, for what `stream` gets next; makes no copy, so it waits for none."""
    def download(self, dst: int, src: int, nbytes: int, stream: int) -> None:
        """Device to host; blocks."""
    def copy(self, dst: int, src: int, nbytes: int, prefetch: bool = False) -> None:
        """Pinned memory to device, on a lane's stream; blocks while the lane is full. finish_copies() waits for it."""
    def gather_mlp(
        self,
        layout: MlpLayout,
        slab: Slab,
        slot_of: NDArray[Any],
        hidden_ptr: int,
        hidden_dtype: str,
        tokens: int,
        index_ptr: int,
        weights_ptr: int,
        weights_dtype: str,
        top_k: int,
        out_ptr: int,
        stream: int,
    ) -> None:
        """emoe._C.gather_mlp in mode "pairs" on `stream`; every address but slot_of's is the device's. Returns when
        the kernels are enqueued, ordered after the copies into their slots and before later ones.
        """
    def gather_mlp_resident(
        self,
        layout: MlpLayout,
        slab: Slab,
        slots: NDArray[Any],
        table_ptr: int,
        experts: int,
        hidden_ptr: int,
        hidden_dtype: str,
        tokens: int,
        index_ptr: int,
        weights_ptr: int,
        weights_dtype: str,
        top_k: int,
        out_ptr: int,
        workspace_ptr: int,
        workspace_bytes: int,
        stream: int,
    ) -> None:
        """gather_mlp with the slot table [experts] int32 in device memory and scratch of the caller's. `slots`: every
        slot that the table may name, checked here; what the table holds is not. A stream that captures a graph only
        gets the kernels: begin_read and end_read go around each replay.
        """
    @staticmethod
    def workspace_bytes(
        layout: MlpLayout, slab: Slab, experts: int, hidden_dtype: str, tokens: int, weights_dtype: str, top_k: int
    ) -> int:
        """Bytes of scratch that gather_mlp_resident needs, 256-byte aligned; calls that may overlap need one each."""
    def capturing(self, stream: int) -> bool:
        """`stream` captures a graph; TransferError where that was invalidated."""
    def combine(
        self, pairs_ptr: int, tokens: int, top_k: int, hidden_out: int, out_ptr: int, out_dtype: str, stream: int
    ) -> None: ...
    def begin_read(self, slab: Slab, slots: NDArray[Any], stream: int) -> None:
        """What `stream` gets next runs after the copies into these slots (integers, cheapest in ascending order)."""
    def end_read(self, slab: Slab, slots: NDArray[Any], stream: int) -> None:
        """Later copies into these slots run after what `stream` got so far."""
    def copy_rate(self, nbytes: int, copies: int = 8) -> float:
        """Bytes a second of pinned host-to-device copies of this size, measured now."""
    def finish_copies(self) -> None: ...

class PinnedCache:
    """Records in slots of pinned host memory."""

    def __init__(self, slots: int, slot_bytes: int, device: int = 0) -> None: ...
    @property
    def address(self) -> int: ...
    @property
    def slots(self) -> int: ...
    @property
    def slot_bytes(self) -> int: ...
    @property
    def used(self) -> int:
        """Slots that somebody uses now."""
    def holds(self, record: int) -> bool: ...

class DeviceQueue:
    """Fills slots of a device: file, pinned memory, device. As TransferQueue where nothing else is said."""

    def __init__(
        self,
        device: CudaDevice,
        slab: Slab,
        table: RecordTable,
        reader: Reader,
        store: PinnedCache,
        *,
        workers: int = 2,
        prefetch_bytes: int = 64 << 20,
    ) -> None: ...
    def submit(self, record: int, slot: int, prefetch: bool = False) -> int: ...
    def submit_host(self, record: int, prefetch: bool = False) -> int:
        """Only into pinned memory; wait() gives the host slot."""
    def promote(self, ticket: int) -> None: ...
    def cancel(self, ticket: int) -> bool: ...
    def ticket_of(self, slot: int) -> int | None:
        """The newest ticket submitted for the slot and not waited for; None: nothing will write to it."""
    def done(self, ticket: int) -> bool: ...
    def issued(self, ticket: int) -> bool:
        """order_after() would not block."""
    def wait(self, ticket: int) -> int:
        """Blocks until the bytes are there; the host slot of submit_host(), held until release_host(), or -1."""
    def order_after(self, ticket: int, stream: int) -> None:
        """Blocks until the copy is in its stream; what `stream` gets next runs after it."""
    def release_host(self, host_slot: int) -> None:
        """TransferError where it is not held."""
    def reclaim_host(self) -> None:
        """Ends every submit_host() and releases every host slot that wait() gave out."""
    def stats(self) -> dict[str, Any]: ...
    def close(self) -> None: ...
