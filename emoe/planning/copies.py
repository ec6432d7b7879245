"""Copies of all experts in few bits, for routing coarse: which encoding, and what it takes of a budget."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from emoe.errors import ConfigError, UnsupportedModelError
from emoe.memory import format_bytes
from emoe.model import copies
from emoe.model.copies import CopyLayout
from emoe.model.spec import ExpertForm
from emoe.options import COPIES

# "auto" takes the first that leaves slots for the experts of a token: bits lower the harm more than slots do
# (docs/quality.md). Where the budget is a share of the experts, slots are as asked for and the last is taken.
LADDER = ("q8_0", "q6_k", "q5_k", "q4_k")
# It takes no copies that cost more than this part of the experts: the bytes are then better spent on slots.
MOST_OF_AN_EXPERT = 0.6


@dataclass(frozen=True)
class Copies:
    """Attributes:
    name: the encoding as `coarse=` names it.
    nbytes: all of them.
    layouts: of each layer.
    """

    name: str
    nbytes: int
    layouts: tuple[CopyLayout, ...]


def choose(
    asked: str,
    found: Sequence[tuple[str, nn.Module]],
    forms: Sequence[ExpertForm],
    reasons: Sequence[str],
    experts: Sequence[int],
    room: int | None,
) -> Copies:
    """The copies that `coarse=` asks for.

    Args:
        asked: one of `COPIES`, or "auto".
        found: path and experts module of each layer.
        forms: of an expert of each.
        reasons: why the native kernels do not compute it as it is, or "".
        experts: how many a layer has.
        room: bytes for copies beside the slots of a token's experts; None: as many as the fewest bits take.

    Raises:
        ConfigError: copies would take more than they save.
        UnsupportedModelError: a layer's experts are not computed natively, or have no such copy.
    """
    for (path, _), reason in zip(found, reasons, strict=True):
        if reason:
            raise UnsupportedModelError(
                f"routing='coarse' needs the native kernels, and the experts of {path} run Transformers' own code: "
                f"{reason} routing='exact' runs them"
            )
    whole = sum(count * form.nbytes for count, form in zip(experts, forms, strict=True))
    if asked != "auto":
        made = _made(asked, found, forms, experts)
        if made.nbytes >= whole:
            raise ConfigError(
                f"coarse={asked!r} makes copies of {format_bytes(made.nbytes)} for experts of {format_bytes(whole)} "
                f"({_encodings(forms)}): they save nothing; routing='exact' needs none"
            )
        return made
    for name in LADDER:
        made = _made(name, found, forms, experts)
        if made.nbytes <= MOST_OF_AN_EXPERT * whole and room is not None and made.nbytes <= room:
            return made
    if made.nbytes > MOST_OF_AN_EXPERT * whole:
        raise ConfigError(
            f"experts take few bits already ({_encodings(forms)}): copies in {name} would take "
            f"{format_bytes(made.nbytes)} beside experts of {format_bytes(whole)}, which is better spent on slots. "
            f"routing='exact' and 'resident' need no copies; {_smaller(found, forms, experts, whole)}"
        )
    return made


def _smaller(
    found: Sequence[tuple[str, nn.Module]], forms: Sequence[ExpertForm], experts: Sequence[int], whole: int
) -> str:
    """What `coarse=` makes all the same: what takes a tenth less than the experts, or still less."""
    sizes = {}
    for name in COPIES:
        try:
            sizes[name] = _made(name, found, forms, experts).nbytes / whole
        except UnsupportedModelError:  # rows of other lengths
            continue
    offered = [f"{name} ({size:.0%} of them)" for name, size in sizes.items() if size <= 0.9]
    if not offered:
        return "there is no smaller copy of such rows"
    return f"coarse= makes them all the same: {', '.join(offered)}; docs/quality.md has what they cost"


def _made(
    name: str, found: Sequence[tuple[str, nn.Module]], forms: Sequence[ExpertForm], experts: Sequence[int]
) -> Copies:
    layouts = tuple(
        copies.describe(path, module, form.params, name) for (path, module), form in zip(found, forms, strict=True)
    )
    return Copies(name, sum(count * each.nbytes for count, each in zip(experts, layouts, strict=True)), layouts)


def _encodings(forms: Sequence[ExpertForm]) -> str:
    return ", ".join(dict.fromkeys(name for form in forms for name in form.encodings))
