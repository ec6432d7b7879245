"""What the config of a quantized checkpoint says of blocks and groups: read wherever it is, to confirm what shapes say.

No method is told by its name: some checkpoints have none, or one that names another format than their experts have.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from emoe.errors import CheckpointError
from emoe.files import jsontext
from emoe.model.encoding import encoding

# Beside config.json: of modelopt, AutoGPTQ and AutoAWQ.
QUANTIZER_FILES = ("hf_quant_config.json", "quantize_config.json", "quant_config.json")
# What `emoe convert` calls itself, and the key under which it keeps what was said of weights outside experts.
OWN_METHOD, OWN_REST = "emoe", "rest"
# Rows and columns that share a scale; 0 stands for all there are.
TENSOR, ROW = (0, 0), (1, 0)
# Keys under which quantizers speak of rotations of what goes into a layer.
_TRANSFORMS = re.compile("hadamard|rotat|quarot|spinquant", re.IGNORECASE)

Block = tuple[int, int]


@dataclass(frozen=True)
class Declared:
    """Attributes:
    where: what says it, for messages; "" where nothing does.
    method: as it calls itself.
    bytes: rows and columns that share a scale, of weights with a byte each.
    bits: columns that share a scale, of weights with four bits each; 0 stands for a whole row.
    widths: bits of a weight.
    symmetric: whether integers have zero points of their own, as far as that is said.
    zeros: "gptq" or "gptq_v2" where that is said.
    ordered: whether inputs lie in groups in an order of their own (desc_act, actorder), as far as that is said.
    experts: bits of experts' weights where they are said apart, else 0.
    kinds: of numbers, "float" and "int", as far as that is said.
    """

    where: str = ""
    method: str = ""
    bytes: frozenset[Block] = field(default=frozenset())
    bits: frozenset[int] = field(default=frozenset())
    widths: frozenset[int] = field(default=frozenset())
    symmetric: frozenset[bool] = field(default=frozenset())
    zeros: str = ""
    ordered: frozenset[bool] = field(default=frozenset())
    experts: int = 0
    kinds: frozenset[str] = field(default=frozenset())


NOTHING = Declared()


def shown(block: Block) -> str:
    """A block in words."""
    return {TENSOR: "one scale", ROW: "a scale a row"}.get(block, f"blocks of {block[0]}x{block[1]}")


def declared(quantization: Mapping[str, Any] | None, folder: str | Path | None = None) -> Declared:
    """What a config says, and where it says nothing, a file of the quantizer beside it. As `said_of_encodings`."""
    found = said_of_encodings(quantization, folder)
    return NOTHING if found is None else _declared(*found)


def said_of_encodings(
    quantization: Mapping[str, Any] | None, folder: str | Path | None = None
) -> tuple[Mapping[str, Any], str] | None:
    """What a config says, or a file of the quantizer beside it, and which of them; None where neither does.

    Args:
        quantization: `quantization_config` of the config, wherever in it.
        folder: of the checkpoint's files.

    Raises:
        CheckpointError: such a file is no JSON, or any of them says that what goes into layers, or comes out, is
            transformed, be it beside a config that speaks of encodings.
    """
    found: list[tuple[Mapping[str, Any], str]] = []
    if quantization is not None:
        _require_no_transform(quantization, str(Path(folder or "") / "config.json"))
        found.append((quantization, "config.json"))
    for name in QUANTIZER_FILES if folder is not None else ():
        path = Path(folder or "") / name
        if path.is_file():
            beside = jsontext.read(path, "config of a quantizer", partial(CheckpointError, file=str(path)))
            if isinstance(beside, dict):
                _require_no_transform(beside, str(path))
                found.append((beside, name))
    return next(iter(found), None)


def _require_no_transform(said: Mapping[str, Any], file: str) -> None:
    """Refuses rotations of activations; of those that were multiplied into the weights there is nothing to do."""
    for key, value in said.items():
        if not value:
            continue
        if key == "transform_config":  # compressed-tensors
            where = _online(value)
        elif key == "algo_config":  # Quark
            parts = value if isinstance(value, (list, tuple)) else [value]
            where = next((where for each in parts if (where := _rotated(each))), "")
        elif _TRANSFORMS.search(str(key)):
            where = f"{value}"
        else:
            for each in value if isinstance(value, (list, tuple)) else (value,):
                if isinstance(each, Mapping):
                    _require_no_transform(each, file)
            continue
        if where:
            raise CheckpointError(
                f"{file} says with {key} that the model computes with transformed values ({where[:80]}), which emoe "
                "does not; take a checkpoint whose rotations are all folded into its weights",
                file=file,
            )


def _online(transforms: Any) -> str:
    """Where a transform has to be applied at run time; "" where the weights hold all of it."""
    groups = transforms.get("config_groups") if isinstance(transforms, Mapping) else None
    if not isinstance(groups, Mapping):
        return str(transforms)
    for scheme in groups.values():
        places = scheme.get("apply") if isinstance(scheme, Mapping) else None
        if not isinstance(places, (list, tuple)):
            return str(scheme)
        for place in places:
            location = place.get("location") if isinstance(place, Mapping) else place
            if str(getattr(location, "value", location)) not in ("weight_input", "weight_output"):
                return f"location {getattr(location, 'value', location)}"
    return ""


def _rotated(algorithm: Any) -> str:
    """What one of Quark's leaves to run time: the fourth rotation, and those that it calls online."""
    if not isinstance(algorithm, Mapping) or str(algorithm.get("name")).lower() not in ("rotation", "quarot"):
        return ""
    if algorithm.get("r4", True):
        return f"{algorithm['name']} with r4"
    return next((str(key) for key, value in algorithm.items() if str(key).startswith("online") and value), "")


def _declared(said: Mapping[str, Any], where: str) -> Declared:
    if said.get("quant_method") == OWN_METHOD:
        return _by_emoe(said, where)
    blocks: set[Block] = set()
    groups: set[int] = set()
    widths: set[int] = set()
    symmetric: set[bool] = set()
    ordered: set[bool] = set()
    kinds: set[str] = set()
    for weights in _statements(said):
        width = _width(weights)
        widths |= {width} if width else set()
        kinds |= {weights["type"]} if weights.get("type") in ("float", "int") else set()
        symmetric |= {weights["symmetric"]} if type(weights.get("symmetric")) is bool else set()
        ordered |= {weights["desc_act"]} if type(weights.get("desc_act")) is bool else set()
        ordered |= {weights["actorder"] in (True, "group", "dynamic")} if "actorder" in weights else set()
        block = block_of(weights)
        if block is not None and (width == 8 or "weight_block_size" in weights):
            blocks.add(block)
        elif block is not None and block[0] <= 1 and width in (4, 0):
            groups.add(block[1])
    inner = said.get("quantization")
    method = said.get("quant_method") or said.get("quant_algo")
    method = method or (inner.get("quant_algo") if isinstance(inner, Mapping) else None)
    # Two keys of two ages of one quantizer; compressed-tensors has the second for something else.
    keys = ("checkpoint_format", "format") if method == "gptq" else ("checkpoint_format",)
    formats = {str(said[key]) for key in keys if said.get(key)}
    zeros = next(iter(formats), "") if len(formats) == 1 and formats <= {"gptq", "gptq_v2"} else ""
    if not formats and method == "gptq":
        zeros = "gptq"  # before there were two
    if method in ("fp8", "fbgemm_fp8"):
        kinds.add("float")
    name = str(getattr(method, "value", method) or "an unknown method")
    return Declared(
        where,
        name,
        frozenset(blocks),
        frozenset(groups),
        frozenset(widths),
        frozenset(symmetric),
        str(zeros),
        frozenset(ordered),
        {"fp4": 4, "fp8": 8}.get(str(said.get("expert_dtype")), 0),
        frozenset(kinds),
    )


def _by_emoe(said: Mapping[str, Any], where: str) -> Declared:
    """Experts are in the encodings that are listed; the rest is as it was, where any of it is encoded."""
    rest, listed = said.get(OWN_REST), said.get("encodings")
    found = _declared(rest if isinstance(rest, Mapping) else {}, where)
    names = [encoding(str(name)) for name in (listed if isinstance(listed, (list, tuple)) else ())]
    with_scales = [(how, scales.block) for how in names if (scales := how.plane("scales"))]  # else blocks hold them
    bytes_each = {block for how, block in with_scales if how.planes[0].block == (1, 1)}
    bits_each = {block[1] for how, block in with_scales if how.planes[0].block != (1, 1)}

    def together(rest: frozenset[Any], own: Iterable[Any], speaks: bool = False) -> frozenset[Any]:
        """None, which is any, where the rest may have any; `speaks`: by its silence it says that it has none."""
        return rest | set(own) if rest or speaks or OWN_REST not in said else frozenset()

    return replace(
        found,
        method=OWN_METHOD,
        kinds=frozenset(),
        bytes=together(found.bytes, bytes_each),
        bits=together(found.bits, bits_each, speaks=bool(found.bytes)),
        widths=together(found.widths, [8] * bool(bytes_each) + [4] * bool(bits_each)),
        symmetric=frozenset([True, OWN_REST not in said])
        if any(how.codes == "int4" for how in names)
        else found.symmetric,
    )


def _statements(said: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Every part that speaks of weights, never of activations."""
    yield said
    for group in _parts(said.get("config_groups")):
        if isinstance(group.get("weights"), Mapping):
            yield group["weights"]
    for key in ("quantized_layers", "dynamic"):
        yield from _parts(said.get(key))
    if isinstance(inner := said.get("quantization"), Mapping):
        yield from _statements(inner)


def _parts(values: Any) -> list[Mapping[str, Any]]:
    return [each for each in values.values() if isinstance(each, Mapping)] if isinstance(values, Mapping) else []


def _width(weights: Mapping[str, Any]) -> int:
    for key in ("num_bits", "bits", "w_bit"):
        if isinstance(weights.get(key), int):
            return int(weights[key])
    algorithm = str(weights.get("quant_algo") or "")
    return 0 if not algorithm or algorithm.startswith("MIXED") else 4 if "4" in algorithm else 8


def block_of(weights: Mapping[str, Any]) -> Block | None:
    """Rows and columns that share a scale by what is said of weights; None where that is not said."""
    for key in ("weight_block_size", "block_structure"):
        size = weights.get(key)
        if isinstance(size, str) and (found := re.fullmatch(r"(\d+)x(\d+)", size)):
            size = [int(each) for each in found.groups()]
        if isinstance(size, (list, tuple)) and len(size) == 2 and all(type(each) is int and each > 0 for each in size):
            return size[0], size[1]
    if weights.get("strategy") in ("tensor", "channel"):
        return TENSOR if weights["strategy"] == "tensor" else ROW
    # Of a byte each, only compressed-tensors and GPTQ mean by it what shares a scale.
    means = _width(weights) != 8 or weights.get("strategy") == "group" or "desc_act" in weights
    for key in ("group_size", "q_group_size") if means else ():
        if type(size := weights.get(key)) is int and size != 0:
            return 1, max(size, 0)
    return None
