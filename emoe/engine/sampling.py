"""From logits to a token: one request's own processors, generator and log-probabilities."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from emoe.errors import ConfigError

# What `generate` can do and one request of a step cannot.
_REFUSED = (
    "num_beams", "num_return_sequences", "guidance_scale", "assistant_model", "prompt_lookup_num_tokens",
    "penalty_alpha", "num_beam_groups",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How one request's tokens are chosen, and when it stops.

    Unset values change nothing: unlike `generate`, which keeps the 50 likeliest where top_k is unset, all are kept.

    Attributes:
        temperature: 0 takes the likeliest token each time.
        top_k, top_p, min_p, repetition_penalty: as in Transformers.
        seed: of this request's own generator: tokens are those of `generate` after `torch.manual_seed(seed)`. None: of
            torch's own.
        stop: the text ends before the first of these strings that comes.
        eos: token ids that end it; None: those of the model's generation config, () for none.
        logprobs: how many alternatives to report for each token; None for no log-probabilities.
        processors: further logits processors of Transformers' kind ((ids [1, T], scores [1, V]) -> scores), such as
            those that keep to a grammar; this request's own, and applied first.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    stop: Sequence[str] = ()
    eos: Sequence[int] | None = None
    logprobs: int | None = None
    processors: Sequence[Any] = ()

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        for name, least, most in (
            ("temperature", 0.0, None), ("top_k", 0, None), ("top_p", 0.0, 1.0), ("min_p", 0.0, 1.0),
            ("repetition_penalty", 0.0, None), ("logprobs", 0, None),
        ):  # fmt: skip
            value = getattr(self, name)
            if value is None:
                continue
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not number or not least <= value or (most is not None and value > most) or value == float("inf"):
                raise ConfigError(
                    f"{name}={value!r} is not a number from {least}{'' if most is None else f' to {most}'}"
                )
        if self.repetition_penalty == 0:
            raise ConfigError("repetition_penalty=0 is not a number over 0; 1 changes nothing")
        if not all(isinstance(each, str) and each for each in self.stop):
            raise ConfigError(f"stop={list(self.stop)!r} is not a list of texts that are not empty")

    @classmethod
    def of(cls, config: GenerationConfig, **changes: Any) -> Sampling:
        """What a generation config says, with changes.

        Raises:
            ConfigError: it asks for what one request cannot do (beams, guidance, several answers).
        """
        for name in _REFUSED:
            value = getattr(config, name, None)
            if value not in (None, 1, 1.0):
                raise ConfigError(f"{name}={value!r}: requests of an engine have one sequence; submit several instead")
        sampled = bool(config.do_sample)
        given = cls(
            temperature=(1.0 if config.temperature is None else float(config.temperature)) if sampled else 0.0,
            top_k=config.top_k if sampled else None,
            top_p=config.top_p if sampled else None,
            min_p=config.min_p if sampled else None,
            repetition_penalty=config.repetition_penalty,
        )
        return replace(given, **changes)

    def made(self) -> LogitsProcessorList:
        """Transformers' processors, in the order in which `generate` applies them."""
        made = LogitsProcessorList(self.processors)
        if self.repetition_penalty not in (None, 1.0):
            made.append(RepetitionPenaltyLogitsProcessor(float(self.repetition_penalty)))
        if not self.temperature:
            return made
        if self.temperature != 1.0:
            made.append(TemperatureLogitsWarper(float(self.temperature)))
        if self.top_k:
            made.append(TopKLogitsWarper(self.top_k))
        if self.top_p is not None and self.top_p < 1.0:
            made.append(TopPLogitsWarper(self.top_p))
        if self.min_p is not None:
            made.append(MinPLogitsWarper(self.min_p))
        return made


class Sampler:
    """Chooses one request's tokens."""

    def __init__(self, sampling: Sampling) -> None:
        self._processors = sampling.made()
        self._sampled, self._seed, self._logprobs = bool(sampling.temperature), sampling.seed, sampling.logprobs
        self._generator: torch.Generator | None = None

    def drawn(self, device: torch.device) -> torch.Tensor | None:
        """State of its generator, for `draw_from`; None: it has none of its own."""
        if self._generator is None and self._sampled and self._seed is not None:
            self._generator = torch.Generator(device).manual_seed(self._seed)
        return None if self._generator is None else self._generator.get_state()

    def draw_from(self, state: torch.Tensor | None) -> None:
        """What comes next is drawn from this state."""
        if self._generator is not None and state is not None:
            self._generator.set_state(state)

    def __call__(self, tokens: Sequence[int], logits: torch.Tensor) -> tuple[int, dict[int, float] | None]:
        """The token after `tokens`, from logits [V]; and natural log-probabilities, before processors, of it and the
        likeliest."""
        scores = logits[None].to(torch.float32, copy=True)  # processors may write into them
        if self._processors:
            scores = self._processors(torch.tensor([list(tokens)], device=logits.device), scores)
        if self._sampled:
            self.drawn(logits.device)
            token = int(torch.multinomial(scores.softmax(-1), 1, generator=self._generator))
        else:
            token = int(scores.argmax())
        if self._logprobs is None:
            return token, None
        logged = logits.float().log_softmax(-1)
        best = logged.topk(min(self._logprobs, len(logged))).indices.tolist() if self._logprobs else []
        return token, {choice: logged[choice].item() for choice in dict.fromkeys([token, *best])}
