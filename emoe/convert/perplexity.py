"""How well a checkpoint predicts a text, run by emoe inside a budget."""

from __future__ import annotations

from pathlib import Path

import torch

import emoe
from emoe import generate
from emoe.demo.quality import perplexity
from emoe.errors import ConfigError
from emoe.files import content

WINDOW = 256  # tokens that are predicted from one another
MOST = 64  # windows
KERNELS = "native"  # as the models will run
_LARGEST = 64 << 20  # bytes of a text


def perplexity_of(folder: Path, text: str | Path, memory: int) -> float:
    """Perplexity over the first 64 windows of 256 tokens of a text; a shorter one is one window.

    Args:
        memory: bytes of the model, as `memory_budget` of `emoe.from_pretrained`.

    Raises:
        ConfigError: the text cannot be read, is not UTF-8, or has fewer than two tokens.
        BudgetError: the model does not fit.
    """
    data = content(text, "text", ConfigError, most=_LARGEST)
    try:
        words = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{text}: the text is not UTF-8: {error}") from error
    ids = generate.load_tokenizer(str(folder))(words, add_special_tokens=False, verbose=False)["input_ids"]
    length = min(WINDOW, len(ids))
    if length < 2:
        raise ConfigError(f"{text}: the text has {len(ids)} tokens; perplexity takes two")
    rows = torch.tensor(ids[: len(ids) // length * length]).view(-1, length)[:MOST]
    model = emoe.from_pretrained(folder, memory_budget=memory, context=length, kernels=KERNELS)
    try:
        return perplexity(model, rows, batch=1)
    finally:
        model.emoe.close(restore=False)
