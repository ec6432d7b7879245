"""How experts are stored, in words: what a plan, `stats()` and the command line say of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from emoe.model.spec import ExpertForm

_WEIGHTS = {"gate_up_proj": ("gate", "up"), "up_proj": ("up",), "down_proj": ("down",)}


def encodings_of(form: ExpertForm) -> dict[str, str]:
    """Encoding of each weight matrix of an expert: of gate, up and down, or of parameters where they are others."""
    found: dict[str, str] = {}
    for param in form.params:
        if len(param.shape) != 2:
            continue
        matrices = sorted((each for each in form.matrices if each.param == param.name), key=lambda each: each.start)
        names = [each.encoding for each in matrices] or [param.dtype]
        own = _WEIGHTS.get(param.name, (param.name,))
        found |= {own[0]: names[0], own[-1]: names[-1]}
    return found


def alike(layers: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Layers of which the same is said, together: {"layers": their numbers, ...what is said}."""
    found: list[dict[str, Any]] = []
    for number, said in enumerate(layers):
        for row in found:
            if all(row[name] == value for name, value in said.items()):
                row["layers"].append(number)
                break
        else:
            found.append({"layers": [number], **said})
    return found


def in_words(encodings: Mapping[str, str]) -> str:
    """ "q4_k", or "gate and up q4_k, down q6_k"."""
    if len(set(encodings.values())) == 1:
        return next(iter(encodings.values()))
    by_name: dict[str, list[str]] = {}
    for weight, name in encodings.items():
        by_name.setdefault(name, []).append(weight)
    return ", ".join(f"{' and '.join(weights)} {name}" for name, weights in by_name.items())
