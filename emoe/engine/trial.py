"""Which way a model runs: short forwards of three requests in mixed batches must give what each gives alone."""

from __future__ import annotations

import logging
import statistics
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from emoe.engine.attention import STOCK
from emoe.engine.families import KNOWN
from emoe.engine.runner import WAYS, Piece, Runner, Way
from emoe.engine.state import Footprint, is_plain, new_state
from emoe.errors import UnsupportedModelError, one_line

logger = logging.getLogger(__name__)

# Of the logits, in their standard deviations. Stock attention alone in chunks differs from itself by 1e-6 to 5e-6 in
# fp32; in 16 bits a router's near-tie moves single rows by more than any fault would, and the median is looked at.
_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-4, torch.bfloat16: 0.1, torch.float16: 0.02}


@dataclass(frozen=True)
class Choice:
    """How a model runs.

    Attributes:
        way: the fastest that is right.
        whole: prompts run in one piece: chunks of them give something else even alone.
        footprint: bytes of a request's state.
        longest: tokens of a request beyond which its rotary positions depend on other requests; None: none.
        reasons: why faster ways were not taken.
    """

    way: Way
    whole: bool
    footprint: Footprint
    longest: int | None
    reasons: dict[str, str] = field(default_factory=dict)


def choose(model: Any, way: Way | None = None) -> Choice:
    """Runs the trial.

    Args:
        model: nothing else runs on it meanwhile.
        way: the only one to try; None for all.

    Raises:
        UnsupportedModelError: it is not what engines run, or no way gives a request its own results; every reason.
    """
    _require_decoder(model)
    reasons: dict[str, str] = {}
    trial = _Trial(model)
    for each, whole in _candidates(model, way):
        try:
            trial.compare(each, whole)
        except Exception as error:  # whatever the model's code makes of it: the next way
            reasons[f"{each}, {'whole prompts' if whole else 'chunks'}"] = f"{type(error).__name__}: {one_line(error)}"
            logger.info("emoe: %s does not run %s: %s", type(model).__name__, each, error)
            continue
        return Choice(each, whole, trial.footprint, _longest(model), reasons)
    listed = "; ".join(f"{name}: {reason[:200]}" for name, reason in reasons.items())
    raise UnsupportedModelError(
        f"{type(model).__name__} gives requests of one batch other results than alone: {listed}. Use model.generate"
    )


def _require_decoder(model: Any) -> None:
    name, attention = type(model).__name__, _config(model)._attn_implementation
    if _config(model).is_encoder_decoder:
        raise UnsupportedModelError(f"{name} has an encoder; engines run decoders")
    if hasattr(model, "_orig_mod") or getattr(model, "_compiled_call_impl", None) is not None:
        raise UnsupportedModelError(f"{name} is compiled; give the model before torch.compile")
    if attention not in STOCK:
        raise UnsupportedModelError(
            f"attn_implementation={attention!r} is not one of those that engines run: {', '.join(STOCK)}; "
            "model.set_attn_implementation('sdpa') changes it"
        )


def _candidates(model: Any, way: Way | None) -> Iterator[tuple[Way, bool]]:
    """What to try, best first. In 16 bits only what is known, or what cannot go wrong by the order of sums."""
    known = KNOWN.get(_config(model).model_type)
    exact = model.dtype in (torch.float32, torch.float64)
    if known is not None and way in (None, known[0]):
        yield known
    # A recurrent state that a chunk forgets shows in the tenth of a standard deviation that 16 bits leave open.
    chunks = exact or is_plain(new_state(model, 1))
    for each in WAYS if way is None else (way,):
        for whole in (False, True) if chunks else (True,):
            if (each, whole) != known:
                yield each, whole


class _Trial:
    """Three requests: they join, run in chunks, decode.

    Steps of a family that is not known have a prime number of rows, above every number of heads, so that no other
    dimension is taken for the rows; those of one that is have few, as a large model takes its time.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        known = _config(model).model_type in KNOWN
        self._rows = 11 if known else _prime_above(max(_sizes(_config(model)), default=8))
        generator = torch.Generator().manual_seed(0)
        most = min(_config(model).vocab_size, 1000)
        # Of the first step: the second part of a, all of b but two tokens; of the next, a token of a and b, and c.
        tail, head = self._rows // 3, 3
        lengths = (head + self._rows - tail + 2, tail + 2, self._rows - 2 + 1)
        self._prompts = [torch.randint(3, most, (count,), generator=generator).tolist() for count in lengths]
        self._head = head
        self._alone: list[list[torch.Tensor]] = []
        self.footprint = Footprint()

    def compare(self, way: Way, whole: bool) -> None:
        """Raises whatever the model raises, and UnsupportedModelError where results differ."""
        if not self._alone:
            self._run_alone()
        runner = Runner(self._model, way)
        try:
            worst = self._differences(runner, whole)
        finally:
            runner.close()
        known = KNOWN.get(_config(self._model).model_type) == (way, whole)
        coarse = known and self._model.dtype in (torch.bfloat16, torch.float16)
        off = statistics.median(worst) if coarse else max(worst)
        if not off <= _TOLERANCE.get(self._model.dtype, 1e-4):
            raise UnsupportedModelError(f"logits of a mixed batch differ by {off:.2g} standard deviations")

    def _run_alone(self) -> None:
        runner = Runner(self._model, "alone")
        states = [new_state(self._model, len(prompt)) for prompt in self._prompts]
        alone = []
        for prompt, state in zip(self._prompts, states, strict=True):
            end = len(prompt)
            cuts = [(0, end - 2), (end - 2, end - 1), (end - 1, end)]
            alone.append([runner.run([Piece(state, prompt[start:stop], start)])[0] for start, stop in cuts])
        short, long = sorted(range(3), key=lambda each: len(self._prompts[each]))[::2]
        self.footprint = Footprint.of(*((states[each], len(self._prompts[each])) for each in (short, long)))
        self._alone = alone

    def _differences(self, runner: Runner, whole: bool) -> list[float]:
        a, b, c = self._prompts
        states = [new_state(self._model, len(prompt)) for prompt in self._prompts]
        head = 0 if whole else self._head

        def step(*parts: tuple[int, int, int]) -> list[torch.Tensor]:
            pieces = [Piece(states[who], self._prompts[who][start:stop], start) for who, start, stop in parts]
            return [row for group in runner.together(pieces) for row in runner.run([pieces[each] for each in group])]

        if head:
            step((0, 0, head))
        first = step((1, 0, len(b) - 2), (0, head, len(a) - 2))
        second = step((0, len(a) - 2, len(a) - 1), (2, 0, len(c) - 2), (1, len(b) - 2, len(b) - 1))
        third = step((2, len(c) - 2, len(c) - 1), (0, len(a) - 1, len(a)), (1, len(b) - 1, len(b)))
        of_a, of_b, of_c = self._alone
        expected = [of_b[0], of_a[0], of_a[1], of_c[0], of_b[1], of_c[1], of_a[2], of_b[2]]
        return [
            ((ours.float() - theirs.float()).abs().max() / theirs.float().std()).item()
            for ours, theirs in zip([*first, *second, *third], expected, strict=True)
        ]


def _config(model: Any) -> Any:
    return model.config.get_text_config(decoder=True)


def _sizes(config: Any) -> list[int]:
    """Numbers of heads, groups and the like that a tensor may have for a dimension."""
    numbers = ((name, value) for name, value in config.to_dict().items() if isinstance(value, int))
    return [value for name, value in numbers if "head" in name and value <= 512 and not isinstance(value, bool)]


def _prime_above(number: int) -> int:
    while True:
        number += 1
        if number > 4 and all(number % each for each in range(2, int(number**0.5) + 1)):
            return number


def _longest(model: Any) -> int | None:
    """The length up to which rotations do not depend on the longest sequence of a batch; None: at no length they do."""
    config = _config(model)
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = [rope, *(part for part in rope.values() if isinstance(part, dict))]
    limits = [
        kind.get("original_max_position_embeddings") or config.max_position_embeddings
        for kind in kinds
        if kind.get("rope_type") in ("dynamic", "longrope")
    ]
    return min(limits, default=None)
