"""One observation for `OnlineSensitivity`: a request's tokens evaluated twice, with experts substituted and without."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from emoe.errors import ConfigError
from emoe.model.structure import find_experts, num_experts
from emoe.requests import Kind, Requests
from emoe.routing import Routing, parse_options, random_residency
from emoe.sensitivity.progressive import next_token_probabilities

SHARE = 0.5  # of the experts resident, where a residency is drawn
ANSWER_TOKENS = 64  # a good number to probe of an answer: their distributions over the vocabulary are in memory


@dataclass(frozen=True)
class Probe:
    """What a probe saw and cost.

    Attributes:
        task: of the request.
        substituted_mass: mean share of router mass that was substituted, or computed with copies.
        logit_change: mean total variation distance, 0 to 1, of the next-token distributions with and without.
        tokens: positions compared.
        seconds: what the two forwards took.
    """

    task: str | None
    substituted_mass: float
    logit_change: float
    tokens: int
    seconds: float


class Prober:
    """Probes requests of one model.

    On a model with a runtime in mode `resident`, `biased` or `coarse`, the substituted pass is the mode as it is, with
    what is resident now; it is counted, and predicted for, as one request. The exact pass then reads what is missing,
    which moves experts in the cache: probe a few percent of the requests. Elsewhere the substituted pass goes through a
    residency drawn at random, mode `resident`; the n-th probe of every task draws the same one, so that tasks are
    compared alike.

    Args:
        model: a Transformers model whose routers emoe recognises, with or without a runtime.
        share: of the experts that a drawn residency holds, at least one of a layer.
        seed: of the draws.

    Raises:
        ConfigError: a share out of its range.
        UnsupportedModelError: a router whose rule is not known.
    """

    def __init__(self, model: Any, *, share: float = SHARE, seed: int = 0) -> None:
        if not 0 < share < 1:
            raise ConfigError(f"share={share} is not between 0 and 1")
        self._model = model
        self._share, self._seed = share, seed
        self._probes: dict[str | None, int] = {}
        self._runtime = getattr(model, "emoe", None) or None
        own = None if self._runtime is None else cast(Routing, self._runtime.routing)
        self._own = own if own is not None and own.options.mode != "exact" else None
        self._drawn: _Drawn | None = None
        if self._own is None:
            self._drawn = _Drawn([num_experts(module) for _, module in find_experts(model)])
            # Other threads' answers are for users.
            self._routing = Routing(model, self._drawn, parse_options("resident"), Requests([], everybodys=False))
        else:
            self._routing = self._own

    @torch.no_grad()
    def __call__(self, input_ids: Tensor | Sequence[int], task: str | None = None, *, prompt_tokens: int = 1) -> Probe:
        """Evaluates a request's tokens with substitution and without.

        Args:
            input_ids: [T] or [1, T] of the request: its prompt, and its answer where there is one; at least 2 tokens.
            task: its task.
            prompt_tokens: how many of them are the prompt. Outputs are compared from its last token on, which is
                the answer, that a user sees. 1 compares everywhere, for a request without an answer.

        Raises:
            ConfigError: too few tokens, or a prompt that leaves no position to compare.
        """
        row = [int(token) for token in torch.as_tensor(input_ids).reshape(-1)]
        if not 1 <= prompt_tokens < len(row):
            raise ConfigError(f"prompt_tokens={prompt_tokens} of {len(row)} tokens; a token has to follow the prompt")
        if self._drawn is not None:
            number = self._probes.get(task, 0)
            self._probes[task] = number + 1
            self._drawn.draw(self._share, self._seed + number)
        started = time.perf_counter()
        with self._unseen():
            try:
                if self._own is None:
                    self._routing.start()
                with self._routing.request(task, "probe") as request:
                    changed = next_token_probabilities(self._model, [row], [prompt_tokens - 1])[0]
            finally:
                if self._own is None:
                    self._routing.close()
            with self._exact():
                untouched = next_token_probabilities(self._model, [row], [prompt_tokens - 1])[0]
        distance = 1 - torch.minimum(changed, untouched).sum(-1).mean().item()
        mass = request.tally.changed_mass
        return Probe(task, mass, min(1.0, max(0.0, distance)), len(changed), time.perf_counter() - started)

    def _unseen(self) -> AbstractContextManager[Any]:
        """A runtime's predictor is to learn nothing from picks that were drawn, nor count a probe as a request."""
        return self._of_kind(Kind.PROBE)

    def _exact(self) -> AbstractContextManager[Any]:
        return self._of_kind(Kind.EXACT)

    def _of_kind(self, kind: Kind) -> AbstractContextManager[Any]:
        return nullcontext() if self._runtime is None else cast(Any, self._runtime).requests.of_kind(kind)


class _Drawn:
    """A residency that is drawn anew for each probe; layers have `experts` [L]."""

    def __init__(self, experts: list[int]) -> None:
        self._experts = experts
        self._now = random_residency(experts, experts)

    def draw(self, share: float, seed: int) -> None:
        self._now = random_residency(self._experts, [max(1, round(share * count)) for count in self._experts], seed)

    def mask(self, layer: int) -> Tensor:
        return self._now.mask(layer)

    def room(self, layer: int) -> int:
        return 0


def probe(
    model: Any, input_ids: Tensor | Sequence[int], task: str | None = None, *, prompt_tokens: int = 1,
    share: float = SHARE, seed: int = 0,
) -> Probe:  # fmt: skip
    """One probe by a `Prober` of its own; see there. For many, keep a Prober: it looks at the routers once."""
    return Prober(model, share=share, seed=seed)(input_ids, task, prompt_tokens=prompt_tokens)
