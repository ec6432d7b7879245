"""One prompt in, one answer out, streamed and timed: what `run` and the demo share. Imports torch and Transformers."""

from __future__ import annotations

import logging
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, LogitsProcessor, LogitsProcessorList, PreTrainedTokenizerFast, TextStreamer

from emoe.errors import ConfigError, one_line
from emoe.files.gguf import open_header
from emoe.model.config import remote_code_refused
from emoe.model.gguf_files import gguf_files

logger = logging.getLogger(__name__)

# What llama.cpp calls ways to cut text (`tokenizer.ggml.pre`) that are GPT-2's.
_SPLIT_AS_GPT2 = (
    "gpt-2", "phi-2", "mpt", "olmo", "jais", "trillion", "granite-docling", "exaone4", "mellum", "gigachat", "a.x-4.0",
)  # fmt: skip


@dataclass
class Answer:
    """What a model generated. Times are seconds after generation began, one per token."""

    prompt_tokens: int
    token_ids: list[int] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    text: str = ""
    interrupted: bool = False

    @property
    def first_token_seconds(self) -> float | None:
        return self.times[0] if self.times else None

    @property
    def tokens_per_second(self) -> float | None:
        """Rate of decode: tokens after the first, over the time after the first. None with fewer than two tokens."""
        if len(self.times) < 2:
            return None
        return (len(self.times) - 1) / (self.times[-1] - self.times[0])


class _Stream(TextStreamer):
    """Hands finished pieces of text to `write`, and notes ids and times in `answer`."""

    def __init__(self, tokenizer: Any, answer: Answer, write: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._answer = answer
        self._write = write
        self._started = time.perf_counter()

    def put(self, value: torch.Tensor) -> None:
        if not self.next_tokens_are_prompt:
            self._answer.times.append(time.perf_counter() - self._started)
            self._answer.token_ids.extend(value.reshape(-1).tolist())
        super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if text:
            self._answer.text += text
            self._write(text)


class Along(LogitsProcessor):
    """Has a model give an answer that is not its own, and counts the tokens that would have been.

    Attributes:
        answer: token ids.
        same: how many of them were the likeliest at their place.
    """

    def __init__(self, answer: Sequence[int]) -> None:
        self.answer, self.same = tuple(answer), 0
        self._given = 0

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        token = self.answer[self._given]
        self._given += 1
        self.same += int(scores[0].argmax()) == token
        return torch.full_like(scores, -math.inf).index_fill(1, torch.tensor([token], device=scores.device), 0.0)


def quiet_transformers() -> None:
    """Silences its warnings, and its bars where nobody watches."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    if not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()


def load_tokenizer(model: str, *, trust_remote_code: bool = False) -> Any:
    """The tokenizer beside a checkpoint, or in it where it is GGUF.

    Raises:
        ConfigError: there is none that Transformers can load.
    """
    try:
        if files := gguf_files(model, {}):
            return _tokenizer_of(files[0])
        return AutoTokenizer.from_pretrained(model, trust_remote_code=trust_remote_code)
    except Exception as error:  # missing files raise anything from OSError to TypeError
        if "trust_remote_code" in str(error):
            raise remote_code_refused(model) from error
        why = one_line(error)[:200]
        raise ConfigError(f"{model} has no tokenizer that Transformers can load: {why}") from error


def _tokenizer_of(file: Path) -> Any:
    """With the file's chat template. Transformers' Auto class would make a config first, which it can of few files."""
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

    metadata = open_header(file).metadata
    kind, split = (metadata.get(f"tokenizer.ggml.{key}") for key in ("model", "pre"))
    if kind == "gpt2" and split not in (*GGUF_PRE_TOKENIZER_SPLITS, *_SPLIT_AS_GPT2):
        logger.warning(
            "emoe: %s cuts text into words by %r, which Transformers does not know; it is cut as for GPT-2", file, split
        )
    return PreTrainedTokenizerFast.from_pretrained(file.parent, gguf_file=file.name)


def encode(tokenizer: Any, prompt: str, *, chat: bool | None = None) -> Any:
    """Token ids [1, S] of a prompt.

    Args:
        chat: through the tokenizer's chat template; None where it has one.

    Raises:
        ConfigError: chat=True and there is no template, or the prompt has no tokens.
    """
    has_template = bool(getattr(tokenizer, "chat_template", None))
    if chat and not has_template:
        raise ConfigError("--chat: this tokenizer has no chat template; use --no-chat")
    if has_template if chat is None else chat:
        ids = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )["input_ids"]
    else:
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    if ids.numel() == 0:
        raise ConfigError("the prompt has no tokens")
    return ids


def answer(
    model: Any,
    tokenizer: Any,
    input_ids: Any,
    *,
    max_new_tokens: int,
    write: Callable[[str], None],
    temperature: float = 0.0,
    repetition_penalty: float = 1.0,
    along: Along | None = None,
) -> Answer:
    """Generates and streams; an interrupt ends the answer early and is noted in it.

    Args:
        input_ids: [1, S].
        write: takes each finished piece of text.
        temperature: 0 takes the likeliest token each time.
        repetition_penalty: as in Transformers: what logits of tokens that were there are divided by; 1 changes nothing.
        along: the answer to give in the place of its own; ends where that ends, if `max_new_tokens` reaches so far.
    """
    result = Answer(prompt_tokens=input_ids.shape[1])
    options: dict[str, Any] = {"do_sample": temperature > 0}
    if temperature > 0:
        options["temperature"] = temperature
    if along is not None:
        options["logits_processor"] = LogitsProcessorList([along])  # after all that `generate` itself makes
        max_new_tokens = min(max_new_tokens, len(along.answer))
    pad = tokenizer.pad_token_id
    if pad is None:
        ends = model.generation_config.eos_token_id
        pad = ends[0] if isinstance(ends, list) else ends
    stream = _Stream(tokenizer, result, write)
    try:
        model.generate(
            input_ids=input_ids,
            attention_mask=torch.ones_like(input_ids),
            max_new_tokens=max_new_tokens,
            pad_token_id=pad,
            repetition_penalty=repetition_penalty,
            streamer=stream,
            **options,
        )
    except KeyboardInterrupt:
        result.interrupted = True
    return result
