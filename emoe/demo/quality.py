"""How good the demo model is: perplexity on texts, with its own routing or with experts drawn at random."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor


def windows(tokenizer: Any, chats: Sequence[tuple[str, str]], length: int = 256) -> Tensor:
    """Chats (prompt, answer) in the tokenizer's template, as one stream of tokens cut into windows [N, length].

    The rest that fills no window is left out.
    """
    stream: list[int] = []
    for prompt, answer in chats:
        turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
        text = tokenizer.apply_chat_template(turns, tokenize=False)
        stream += tokenizer(text, add_special_tokens=False)["input_ids"]
    whole = len(stream) // length * length
    return torch.tensor(stream[:whole], dtype=torch.long).view(-1, length)


@torch.no_grad()
def perplexity(model: Any, rows: Tensor, *, batch: int = 4) -> float:
    """exp of the mean negative log likelihood of every token but the first of each row [N, T]."""
    total = 0.0
    for part in rows.split(batch):
        logits = model(part).logits[:, :-1].float()
        total += torch.nn.functional.cross_entropy(logits.flatten(0, 1), part[:, 1:].flatten(), reduction="sum").item()
    return math.exp(total / rows[:, 1:].numel())


@contextlib.contextmanager
def random_routing(model: Any, seed: int = 0) -> Iterator[None]:
    """While the block runs, every token goes to experts drawn at random, with the router's own k weights."""
    generator = torch.Generator().manual_seed(seed)

    def draw(_: Any, __: Any, output: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        logits, weights, chosen = output
        drawn = torch.rand(logits.shape, generator=generator).topk(chosen.shape[-1], dim=-1).indices
        return logits, weights, drawn.to(chosen.device)

    handles = [layer.mlp.gate.register_forward_hook(draw) for layer in model.model.layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
