"""From a client's fields to the engine's `Sampling`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from emoe.engine.sampling import Sampling
from emoe.serve.protocol import ChatRequest, CompletionRequest

_NAMES = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


class Penalties:
    """OpenAI's frequency and presence penalties and logit bias, as a logits processor of Transformers' kind.

    Args:
        prompt: tokens of the prompt, which penalties leave out.
        frequency: taken from a token's score for each time that the answer has it.
        presence: taken once where the answer has it at all.
        bias: added, by token id; ids that the model does not have are nobody's.
    """

    def __init__(self, prompt: int, frequency: float, presence: float, bias: Mapping[int, float]) -> None:
        self._prompt, self._frequency, self._presence, self._bias = prompt, frequency, presence, dict(bias)

    def __call__(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """ids [1, T], scores [1, V] -> scores [1, V]."""
        scores = scores.clone()
        if self._frequency or self._presence:
            tokens, counts = ids[0, self._prompt :].unique(return_counts=True)
            scores[0, tokens] -= self._frequency * counts + self._presence
        for token, bias in self._bias.items():
            if token < scores.shape[-1]:
                scores[0, token] += bias
        return scores


def sampling_of(
    body: ChatRequest | CompletionRequest, config: Any, prompt: int, choice: int, first: Sequence[Any] = ()
) -> Sampling:
    """Args:
        body: what is not said in it is as the model's generation config says.
        config: that.
        prompt: tokens of the prompt.
        choice: of several answers each has a seed of its own, the first the one that was given.
        first: processors that come before all others.

    Raises:
        ConfigError: a value is out of its range.
    """
    changes: dict[str, Any] = {name: value for name in _NAMES if (value := getattr(body, name)) is not None}
    processors = list(first)
    bias = {int(token): value for token, value in (body.logit_bias or {}).items()}
    if body.frequency_penalty or body.presence_penalty or bias:
        processors.append(Penalties(prompt, body.frequency_penalty or 0.0, body.presence_penalty or 0.0, bias))
    return Sampling.of(
        config,
        **changes,
        seed=None if body.seed is None else (body.seed + choice) % (1 << 63),
        stop=body.stops,
        eos=() if body.ignore_eos else None,
        logprobs=body.alternatives,
        processors=processors,
    )
