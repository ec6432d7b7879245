"""Which weights outside experts may stay encoded: those of linear layers and embeddings that nothing else reads.

Whoever reads such a weight in another way gets right numbers, decoded for that one use (seam/linear.py); here is told
beforehand who would, so that those are decoded once.
"""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from collections.abc import Mapping
from typing import Any

from torch import nn

from emoe.model.encoding import COMPUTED, encoding
from emoe.model.held import apart, nbytes
from emoe.model.structure import experts_modules, num_experts

# What code may ask of a weight without its numbers.
_HARMLESS = {"dtype", "device", "shape", "size", "dim", "ndim", "numel", "element_size", "requires_grad", "is_meta"}
# Where classes come from that know nothing of a family's layers.
_GENERAL = ("torch.nn.modules.module", "transformers.modeling_utils", "transformers.generation", "transformers.utils",
            "transformers.integrations", "builtins")  # fmt: skip


def layers(model: nn.Module) -> dict[str, str]:
    """Weights of linear layers and embeddings outside experts: name -> why it has to be decoded, "" where it need not.

    Args:
        model: on any device, its experts' parameters there or not.
    """
    found = experts_modules(model)
    inside = tuple(f"{path}." for path, _ in found)
    counts = {num_experts(module) for _, module in found}
    named = dict(model.named_modules())
    return {
        f"{path}.weight" if path else "weight": _why(path, module, named, counts)
        for path, module in named.items()
        if isinstance(module, (nn.Linear, nn.Embedding)) and not f"{path}.".startswith(inside)
    }


def kept(model: nn.Module, encodings: Mapping[str, str], plain: str | None = None) -> dict[str, str]:
    """Encodings of the weights that the native kernels compute with, by name in the model.

    Args:
        encodings: by name, of weights that are one encoded matrix each.
        plain: as `into` takes it.
    """
    found, shared = {}, tied(model)
    for name, why in layers(model).items():
        module = model.get_submodule(name.rpartition(".")[0])
        how = encodings.get(name) or ("" if name in shared else into(module, plain))
        if not why and how and not holds(module, how):
            found[name] = how
    return found


def tied(model: Any) -> set[str]:
    """Names of parameters that are another one's, and of those others."""
    pairs = getattr(model, "all_tied_weights_keys", None) or {}
    return {*pairs, *pairs.values()}


def into(module: nn.Module, plain: str | None) -> str:
    """The encoding that a layer whose weight is plain gets, "" where it stays as it is.

    Args:
        plain: an encoding that is wanted, None for none.
    """
    if plain is None or not isinstance(module, nn.Linear):
        return ""
    return plain if all(plane.holds(*module.weight.shape) for plane in encoding(plain).planes) else ""


def saved_bytes(model: nn.Module, found: Mapping[str, str]) -> int:
    """Bytes of memory by which weights are smaller in the encodings that `kept` gives than in the model's dtype."""
    saved = {}
    for name, how in found.items():
        weight = model.get_parameter(name)
        saved[id(weight)] = weight.numel() * weight.dtype.itemsize - nbytes(encoding(how), *weight.shape)
    return sum(saved.values())


def holds(module: nn.Module, name: str) -> str:
    """Why a layer cannot have its weight in the encoding `name`, "" where it can."""
    if str(module.weight.dtype).removeprefix("torch.") not in COMPUTED:
        return f"its layer computes in {module.weight.dtype}"
    if why := encoding(name).not_native:
        return f"native kernels do not compute on {name}: {why}"
    if isinstance(module, nn.Embedding) and not apart(encoding(name)):
        return f"rows of {name} share blocks, and an embedding takes them one by one"
    return ""


def _why(path: str, module: nn.Module, named: dict[str, nn.Module], counts: set[int]) -> str:
    kind = nn.Linear if isinstance(module, nn.Linear) else nn.Embedding
    if kind is nn.Linear and type(module).forward is not nn.Linear.forward:
        return f"{type(module).__name__} computes in a way of its own"
    if kind is nn.Embedding and module.max_norm is not None:
        return "an embedding with max_norm changes its weight"
    if kind is nn.Linear and module.out_features in counts:
        return "it has an output for each expert, as a router has, whose choices are to be exact"
    parent, _, name = path.rpartition(".")
    for holder, wanted in ((named.get(parent), name), (module, "")):
        for each in type(holder).__mro__:
            if each is not kind and wanted in _read_by(each):
                return f"{each.__name__} reads its weight"
    return ""


@functools.cache
def _read_by(kind: type[Any]) -> frozenset[str]:
    """Names of attributes whose `.weight` the code of a class uses for more than its form; "" for its own weight."""
    if kind.__module__.startswith(_GENERAL) or kind in (nn.Linear, nn.Embedding):
        return frozenset()
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(kind)))
    except (OSError, TypeError, SyntaxError):
        return frozenset()
    harmless = {id(each.value) for each in ast.walk(tree) if isinstance(each, ast.Attribute) and each.attr in _HARMLESS}
    found = set()
    for each in ast.walk(tree):
        if isinstance(each, ast.Attribute) and each.attr == "weight" and id(each) not in harmless:
            if isinstance(each.value, ast.Attribute):
                found.add(each.value.attr)
            elif isinstance(each.value, ast.Name) and each.value.id == "self":
                found.add("")
    return frozenset(found)
