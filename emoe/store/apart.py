"""Experts that lie apart in checkpoints of families whose own have them all in one tensor.

Quantizers take fused experts to pieces and save the linear layers that they made: `experts.7.gate_proj.weight`
(llm-compressor, and the FP8 releases of Qwen) or `experts.gate_proj.7.weight` (modelopt). Transformers maps such names
only for the families whose own they are. What puts them together is said here with its converters, by what the experts
module says of its layout.
"""

from __future__ import annotations

import re
from typing import Any

from emoe.model.structure import experts_modules, param_specs

_NUMBER = r"\d+"
_WAYS = (rf"{_NUMBER}\.{{}}", rf"{{}}\.{_NUMBER}")


def converters(model: Any) -> list[Any]:
    """Transformers' WeightConverters from experts apart to the parameters of each kind of experts module in a model."""
    kinds: dict[tuple[str, type], Any] = {}
    for path, module in experts_modules(model):
        kinds.setdefault((path.rpartition(".")[2], type(module)), module)
    return [
        converter
        for (leaf, _), module in kinds.items()
        for param in param_specs(module)
        for converter in _converters(leaf, param.name, module)
    ]


def is_of_one_expert(pattern: str) -> bool:
    """Whether a source pattern, of Transformers or from here, matches one tensor for each expert."""
    return "*" in pattern or _NUMBER in pattern


def shown(pattern: str) -> str:
    """A source pattern as people write it."""
    return re.sub(r"\(\?<!\[\^\.\]\)|\\(?=\.)", "", pattern).replace(_NUMBER, "*")


def names_apart(path: str) -> str:
    """A pattern of what experts of the module at `path` are called where they lie apart."""
    layers = (way.format("(gate|up|down)_proj") for way in _WAYS)
    return rf"^{re.escape(path)}\.({'|'.join(layers)})\."


def _converters(leaf: str, param: str, module: Any) -> list[Any]:
    from transformers.core_model_loading import Concatenate, Interleave, MergeModulelist, Transpose, WeightConverter

    stem, is_bias, _ = param.partition("_bias")
    layers = {"gate_up_proj": ("gate_proj", "up_proj"), "up_proj": ("up_proj",), "down_proj": ("down_proj",)}.get(stem)
    if layers is None:
        return []
    operations: list[Any] = [MergeModulelist(dim=0)]
    if len(layers) == 2:
        operations.append(Concatenate(dim=1))
        if not module.is_concatenated:
            operations.append(Interleave(dim=1, inverse=True))
    if module.is_transposed and not is_bias:
        operations.append(Transpose(dim0=1, dim1=2))
    end = "bias" if is_bias else "weight"
    start = rf"(?<![^.]){re.escape(leaf)}\."
    return [
        WeightConverter([start + named.format(layer) + rf"\.{end}" for layer in layers], f"{leaf}.{param}", operations)
        for named in _WAYS
    ]
