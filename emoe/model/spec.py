"""Parameters of one expert: names, shapes, dtypes, bytes, and where each lies in a slot."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from emoe.model.encoding import EncodedMatrix, encoding

SLOT_ALIGNMENT = 64  # bytes: a cache line, and the widest vector load of the kernels
PAGE = 4096  # bytes: what a direct read asks of file offsets, addresses and lengths
# Bytes from which an array may start where in a page it does in its file; the room for that is below 1 % of it.
LARGE_ARRAY = 512 << 10


@dataclass(frozen=True)
class ParamSpec:
    """A parameter of one expert, e.g. ("gate_up_proj", (2I, H), "bfloat16"), or an array of an encoded one; the
    dtype, a plain encoding by name, is the one it runs in.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def nbytes(self) -> int:
        """Bytes of it."""
        return encoding(self.dtype).nbytes(self.shape)

    @property
    def large(self) -> bool:
        """Whether a slot has room for it to start anywhere in a page."""
        return self.nbytes >= LARGE_ARRAY


@dataclass(frozen=True)
class ExpertForm:
    """What one expert of a layer is, and how it lies in a slot.

    Attributes:
        params: as the module has them, in the dtype that the model runs in.
        stored: what a slot holds: the parameters themselves, or the planes of those that are encoded.
        matrices: how planes make parameters; a parameter that is stored as it is has none.
    """

    params: tuple[ParamSpec, ...]
    stored: tuple[ParamSpec, ...]
    matrices: tuple[EncodedMatrix, ...] = ()

    @classmethod
    def plain(cls, params: tuple[ParamSpec, ...]) -> ExpertForm:
        """Every parameter stored as it is."""
        return cls(params, params)

    @property
    def nbytes(self) -> int:
        """Bytes of one expert as stored, without what aligns it."""
        return sum(each.nbytes for each in self.stored)

    @property
    def encodings(self) -> tuple[str, ...]:
        """Names, each once: of the matrices, else of the parameters."""
        names = [each.encoding for each in self.matrices] or [each.dtype for each in self.stored]
        return tuple(dict.fromkeys(names))


def slot_offsets(stored: Iterable[ParamSpec], places: Mapping[str, int] | None = None) -> tuple[dict[str, int], int]:
    """Where each array of one expert starts in a slot, and the bytes of the whole.

    Args:
        stored: the arrays.
        places: where in a page some of them have to start; the others start at the next multiple of 64.
    """
    offsets: dict[str, int] = {}
    end = 0
    for each in stored:
        start = end if places is None else end + (places.get(each.name, end) - end) % PAGE
        offsets[each.name] = start
        end = -(-(start + each.nbytes) // SLOT_ALIGNMENT) * SLOT_ALIGNMENT
    return offsets, end


def slot_bytes(stored: Iterable[ParamSpec]) -> int:
    """Bytes that hold one expert wherever in a page its large arrays start; a multiple of 64."""
    stored = tuple(stored)
    room = sum(PAGE + SLOT_ALIGNMENT for each in stored if each.large)
    return slot_offsets(stored)[1] + room
