"""From logits to a token: one request's own processors, generator and log-probabilities."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from transformers import (
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    GenerationConfig,
    InfNanRemoveLogitsProcessor,
    LogitsProcessorList,
    MinPLogitsWarper,
    NoBadWordsLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopHLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from emoe.errors import ConfigError

# What `generate` can do and one request of a step cannot.
_REFUSED = (
    "num_beams", "num_return_sequences", "guidance_scale", "assistant_model", "prompt_lookup_num_tokens",
    "penalty_alpha", "num_beam_groups", "min_length", "min_new_tokens", "forced_bos_token_id", "forced_eos_token_id",
    "exponential_decay_length_penalty", "begin_suppress_tokens", "encoder_repetition_penalty",
    "encoder_no_repeat_ngram_size", "watermarking_config", "stop_strings", "max_time",
)  # fmt: skip
# Further settings of a generation config, in the order in which `generate` applies them: before those of sampling, and
# among them. (value, ids that end an answer, device) -> processor.
_Maker = Callable[[Any, Sequence[int], torch.device], Any]
_BEFORE: dict[str, _Maker] = {
    "sequence_bias": lambda value, ends, device: SequenceBiasLogitsProcessor(value),
}
_ALWAYS: dict[str, _Maker] = {
    "no_repeat_ngram_size": lambda value, ends, device: NoRepeatNGramLogitsProcessor(value),
    "bad_words_ids": lambda value, ends, device: NoBadWordsLogitsProcessor(value, list(ends) or None),
    "remove_invalid_values": lambda value, ends, device: InfNanRemoveLogitsProcessor(),
    "suppress_tokens": lambda value, ends, device: SuppressTokensLogitsProcessor(value, device=str(device)),
}
_SAMPLED: dict[str, _Maker] = {
    "typical_p": lambda value, ends, device: TypicalLogitsWarper(mass=value),
    "epsilon_cutoff": lambda value, ends, device: EpsilonLogitsWarper(epsilon=value),
    "eta_cutoff": lambda value, ends, device: EtaLogitsWarper(epsilon=value, device=str(device)),
}
_NEUTRAL = {"typical_p": 1.0, "no_repeat_ngram_size": 0, "epsilon_cutoff": 0.0, "eta_cutoff": 0.0}
_COLDEST = 1e-5  # a lower temperature is 0: scores divided by it may be infinite
_FAINTEST = 0.01  # of repetition penalties, for the same reason


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How one request's tokens are chosen, and when it stops.

    Unset values change nothing: unlike `generate`, which keeps the 50 likeliest where top_k is unset, all are kept.

    Attributes:
        temperature: 0, and what is below 1e-5, takes the likeliest token each time.
        top_k, top_p, min_p, repetition_penalty: as in Transformers.
        seed: of this request's own generator: tokens are those of `generate` after `torch.manual_seed(seed)`. None: of
            torch's own.
        stop: the text ends before the first of these strings that comes.
        eos: token ids that end it; None: those of the model's generation config, () for none.
        logprobs: how many alternatives to report for each token; None for no log-probabilities.
        processors: further logits processors of Transformers' kind ((ids [1, T], scores [1, V]) -> scores), such as
            those that keep to a grammar; this request's own, and applied first.
        further: other settings of a generation config, by Transformers' names: sequence_bias, no_repeat_ngram_size,
            bad_words_ids, remove_invalid_values, suppress_tokens, top_h, typical_p, epsilon_cutoff, eta_cutoff.
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
    further: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        for name, least, most in (
            ("temperature", 0.0, None), ("top_k", 0, None), ("top_p", 0.0, 1.0), ("min_p", 0.0, 1.0),
            ("repetition_penalty", _FAINTEST, None), ("logprobs", 0, None),
        ):  # fmt: skip
            value = getattr(self, name)
            if value is None:
                continue
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not number or not least <= value or (most is not None and value > most) or value == float("inf"):
                raise ConfigError(
                    f"{name}={value!r} is not a number from {least}{'' if most is None else f' to {most}'}"
                )
        for name in ("top_k", "logprobs", "seed"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or not -(1 << 63) <= value < 1 << 63):
                raise ConfigError(f"{name}={value!r} is not a whole number of 64 bits")
        if self.temperature < _COLDEST:
            object.__setattr__(self, "temperature", 0.0)
        known = {*_BEFORE, *_ALWAYS, *_SAMPLED, "top_h"}
        if unknown := self.further.keys() - known:
            raise ConfigError(
                f"further={dict(self.further)!r}: {min(unknown)} is not one of: {', '.join(sorted(known))}"
            )
        eos = (self.eos,) if isinstance(self.eos, int) else self.eos
        if eos is not None and not all(isinstance(each, int) and not isinstance(each, bool) for each in eos):
            raise ConfigError(f"eos={self.eos!r} is not a list of token ids")
        object.__setattr__(self, "eos", eos)
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
            if value not in (None, 0, 1, 1.0):
                raise ConfigError(
                    f"{name}={value!r} of the generation config is nothing that a request of an engine can have: take "
                    "it out of model.generation_config, or give sampling=; several sequences are several requests"
                )
        sampled = bool(config.do_sample)
        given = cls(
            temperature=(1.0 if config.temperature is None else float(config.temperature)) if sampled else 0.0,
            top_k=config.top_k if sampled else None,
            top_p=config.top_p if sampled else None,
            min_p=config.min_p if sampled else None,
            repetition_penalty=config.repetition_penalty,
            further={
                name: value
                for name in (*_BEFORE, *_ALWAYS, *(("top_h", *_SAMPLED) if sampled else ()))
                if (value := getattr(config, name, None)) not in (None, False, _NEUTRAL.get(name))
            },
        )
        return replace(given, **changes)

    def made(self, ends: Sequence[int] = (), device: torch.device | None = None) -> LogitsProcessorList:
        """Transformers' processors, in the order in which `generate` applies them.

        Args:
            ends: ids that end an answer.
            device: of the logits.
        """
        made = LogitsProcessorList(self.processors)

        def add(makers: Mapping[str, _Maker]) -> None:
            here = torch.device("cpu") if device is None else device
            made.extend(make(self.further[name], ends, here) for name, make in makers.items() if name in self.further)

        add(_BEFORE)
        if self.repetition_penalty not in (None, 1.0):
            made.append(RepetitionPenaltyLogitsProcessor(float(self.repetition_penalty)))
        add(_ALWAYS)
        if not self.temperature:
            return made
        if self.temperature != 1.0:
            made.append(TemperatureLogitsWarper(float(self.temperature)))
        if "top_h" in self.further:
            made.append(TopHLogitsWarper(top_h=self.further["top_h"]))
        if self.top_k:
            made.append(TopKLogitsWarper(self.top_k))
        if self.top_p is not None and self.top_p < 1.0:
            made.append(TopPLogitsWarper(self.top_p))
        if self.min_p is not None:
            made.append(MinPLogitsWarper(self.min_p))
        add(_SAMPLED)
        return made


def ends_of(config: Any) -> Sequence[int]:
    """Ids that end an answer, as a generation config says."""
    ends = config.eos_token_id
    return () if ends is None else ends if isinstance(ends, (list, tuple)) else (int(ends),)


class Sampler:
    """Chooses one request's tokens.

    Args:
        sampling: how.
        ends: ids that end an answer.
        device: of the logits.

    Raises:
        ConfigError: a setting is nothing that Transformers takes.
    """

    def __init__(self, sampling: Sampling, ends: Sequence[int] = (), device: torch.device | None = None) -> None:
        try:
            self._processors = sampling.made(ends, device)
        except (ValueError, TypeError) as error:
            raise ConfigError(f"sampling={sampling}: {error}") from error
        self._sampled, self._logprobs = bool(sampling.temperature), sampling.logprobs
        self._generator: torch.Generator | None = None
        if self._sampled and sampling.seed is not None:
            self._generator = torch.Generator("cpu" if device is None else device).manual_seed(sampling.seed)

    def drawn(self) -> torch.Tensor | None:
        """State of its generator, for `draw_from`; None: it has none of its own."""
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
            token = int(torch.multinomial(scores.softmax(-1), 1, generator=self._generator))
        else:
            token = int(scores.argmax())
        if self._logprobs is None:
            return token, None
        logged = logits.float().log_softmax(-1)
        best = logged.topk(min(self._logprobs, len(logged))).indices.tolist() if self._logprobs else []
        return token, {choice: logged[choice].item() for choice in dict.fromkeys([token, *best])}
