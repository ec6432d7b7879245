"""What the config of a quantized checkpoint says each of its weights is encoded in, where no file is there to tell.

By it alone nothing is ever loaded: a checkpoint is read by what its tensors are (store/companions.py). Where a config
leaves open how a weight lies, that is refused by name.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from emoe.errors import CheckpointError, UnsupportedModelError
from emoe.store.declared import ROW, TENSOR, block_of

_LINEAR = "Linear"  # as a target: every linear layer, experts among them


@dataclass(frozen=True)
class Rule:
    """Weights of the modules that `targets` name are `encoding`; None: they are plain.

    A target is a name, of a module or of what it is in, a glob, a regular expression ("re:..."), or "Linear".
    """

    targets: tuple[str, ...]
    encoding: str | None


@dataclass(frozen=True)
class Formats:
    """Attributes:
    where: what says it: "config.json" or a file beside it.
    method: as it calls itself.
    rules: the most specific target counts: a name before a pattern, that before "Linear".
    plain: targets that are not encoded whatever `rules` say.
    experts: encoding of all experts that `rules` do not name; None: the rules' alone.
    head: whether the output projection is one of the linear layers.
    """

    where: str
    method: str
    rules: tuple[Rule, ...] = ()
    plain: tuple[str, ...] = ()
    experts: str | None = None
    head: bool = False

    def encoding(self, module: str, *, expert: bool = False) -> str | None:
        """Name of a module's encoding, None where its weight is plain.

        Args:
            module: as the checkpoint calls it.
            expert: whether it is one.

        Raises:
            UnsupportedModelError: two rules are as specific as each other and differ.
        """
        parts = _parts(module)
        if not self._plain[0].isdisjoint(parts) or any(_matches(each, module) for each in self._plain[1]):
            return None
        by_name, patterns, everywhere = self._rules
        named = {encoding: part for part in parts for encoding in by_name.get(part, ())}
        named = named or {each: target for target, each in patterns if _matches(target, module)}
        if not named and expert and self.experts is not None:
            return self.experts
        named = named or dict.fromkeys(everywhere, _LINEAR)
        if len(named) > 1:
            ways = " and ".join(f"{encoding or 'plain'} by {target!r}" for encoding, target in named.items())
            raise _open(self.where, f"{module} would be {ways}")
        return next(iter(named), None)

    @functools.cached_property
    def _plain(self) -> tuple[set[str], list[str]]:
        names = {target for target in self.plain if _NAME.fullmatch(target)}
        return names, [target for target in self.plain if target not in names]

    @functools.cached_property
    def _rules(self) -> tuple[dict[str, list[str | None]], list[tuple[str, str | None]], list[str | None]]:
        """By name, of which there may be one for each expert; by pattern; for every linear layer."""
        names: dict[str, list[str | None]] = {}
        patterns, everywhere = [], []
        for target, encoding in ((target, rule.encoding) for rule in self.rules for target in rule.targets):
            if target == _LINEAR:
                everywhere.append(encoding)
            elif _NAME.fullmatch(target):
                names.setdefault(target, []).append(encoding)
            else:
                patterns.append((target, encoding))
        return names, patterns, everywhere


_NAME = re.compile(r"[\w.-]+")


def _parts(module: str) -> set[str]:
    """Names that stand for a module: its own, those of what it is in, and both without their front."""
    words = module.split(".")
    return {".".join(words[i:j]) for i in range(len(words)) for j in range(i + 1, len(words) + 1)}


def _matches(target: str, module: str) -> bool:
    """Quantizers mean regular expressions or globs, of the whole name or from its front to a dot."""
    if target.startswith("re:"):
        return re.match(target[3:], module) is not None
    if fnmatchcase(module, target) or fnmatchcase(module, f"{target}.*"):
        return True
    try:
        return re.search(rf"(?:^|\.)(?:{target})(?=\.|$)", module) is not None
    except re.error:
        return False


def formats_said(said: Mapping[str, Any], where: str) -> Formats:
    """What a quantizer's config says.

    Args:
        said: as `emoe.store.declared.said_of_encodings` gives it.
        where: that, too.

    Raises:
        UnsupportedModelError: it leaves open how weights lie, or says that they lie in a way that emoe does not read.
        CheckpointError: a value is of a kind that no quantizer writes.
    """
    try:
        formats = _formats(said, where)
        for target in (*formats.plain, *(each for rule in formats.rules for each in rule.targets)):
            if target.startswith("re:"):
                re.compile(target[3:])
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError, re.error) as error:
        raise CheckpointError(f"{where} says of encodings what emoe cannot read: {error!r}", file=where) from error
    return formats


def _formats(said: Mapping[str, Any], where: str) -> Formats:
    said = {**said, **said["quantization"]} if isinstance(said.get("quantization"), Mapping) else said
    method = said.get("quant_method") or ""
    method = str(getattr(method, "value", method))
    plain = _texts(said, "modules_to_not_convert", "ignored_layers", "ignore", "exclude_modules")
    made = Formats(where, method or str(said.get("quant_algo") or "an unknown method"), plain=plain)
    read = _METHODS.get(method)
    if read is None and (method.startswith("modelopt") or (not method and said.get("quant_algo"))):
        read = _modelopt
    if read is None:
        raise _open(where, f"weights are quantized by {made.method!r}")
    return read(said, made)


def _open(where: str, what: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{where} says that {what}; from that alone emoe cannot tell how they lie. With the safetensors files beside "
        "it, their headers tell; a config without quantization_config is planned as if weights were plain"
    )


def _texts(said: Mapping[str, Any], *names: str) -> tuple[str, ...]:
    given = [said.get(name) or () for name in names]
    found = [each for values in given for each in ((values,) if isinstance(values, str) else values)]
    return tuple(dict.fromkeys(str(each) for each in found))


def _with(made: Formats, **changed: Any) -> Formats:
    return Formats(**{**vars(made), **changed})


def _size(block: tuple[int, int] | None) -> str:
    if block is None or block == TENSOR:
        return "tensor"
    return "row" if block == ROW else f"{block[0]}x{block[1]}"


def _fp8(said: Mapping[str, Any], made: Formats) -> Formats:
    """Weights with a byte each; DeepSeek-V4 and its descendants have experts of four bits among them."""
    block = block_of({"weight_block_size": said.get("weight_block_size")})
    e8m0 = made.method == "mxfp8" or said.get("scale_fmt") == "ue8m0" or "expert_dtype" in said
    if made.method == "mxfp8":
        block = block or (1, 32)
    size = "row" if made.method == "fbgemm_fp8" else _size(block)
    experts = None
    if said.get("moe_quant_algo"):
        experts = _algorithm(str(said["moe_quant_algo"]), said, made)
    elif said.get("expert_dtype") in ("fp4", "mxfp4"):
        experts = "mxfp4"
    elif said.get("expert_dtype") not in (None, "fp8", "float8_e4m3fn"):
        raise _open(made.where, f"experts are {said['expert_dtype']!r}")
    rules = (Rule((_LINEAR,), f"e4m3-{size}-{'e8m0' if e8m0 else 'float32'}"), *_layers(said, made))
    return _with(made, rules=rules, experts=experts)


def _mxfp4(said: Mapping[str, Any], made: Formats) -> Formats:
    """gpt-oss: nothing but experts."""
    return _with(made, experts="mxfp4")


def _emoe(said: Mapping[str, Any], made: Formats) -> Formats:
    """`emoe convert`."""
    encodings = list(said.get("encodings") or [])
    if len(encodings) != 1 or set(said) - {"quant_method", "experts", "encodings"}:
        raise _open(made.where, f"weights are {', '.join(map(str, encodings)) or 'encoded'} by emoe convert")
    return _with(made, experts=str(encodings[0]))


def _compressed_tensors(said: Mapping[str, Any], made: Formats) -> Formats:
    if (said.get("sparsity_config") or {}).get("format") not in (None, "dense"):
        raise _open(made.where, f"weights are sparse ({said['sparsity_config']['format']})")
    rules = []
    for group in _groups(said):
        format = group.get("format") or said.get("format")
        encoding = _of_group(group.get("weights"), "" if format == "mixed-precision" else str(format or ""), made)
        rules.append(Rule(_targets(group), encoding))
    if not rules:
        raise _open(made.where, "weights are quantized by compressed-tensors, and lists no groups")
    return _with(made, rules=tuple(rules), head=True)


def _groups(said: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    groups = said.get("config_groups")
    return [each for each in groups.values() if isinstance(each, Mapping)] if isinstance(groups, Mapping) else []


def _targets(group: Mapping[str, Any]) -> tuple[str, ...]:
    return _texts(group, "targets")


def _of_group(weights: Any, format: str, made: Formats) -> str | None:
    """The encoding that the `weights` of a group of compressed-tensors say; None: its weights are plain."""
    if not isinstance(weights, Mapping) or format == "dense":
        return None
    bits, kind, block = weights.get("num_bits"), weights.get("type"), block_of(weights)
    zeros = weights.get("symmetric") is False
    if kind == "float" and not zeros and bits == 8 and block is not None:
        scale = "e8m0" if "uint8" in str(weights.get("scale_dtype")) else "bfloat16"
        return f"e4m3-{_size(block)}-{scale}"
    if kind == "float" and not zeros and bits == 4 and block in ((1, 16), (1, 32)):
        return "nvfp4_divided" if block == (1, 16) else "mxfp4"
    if kind == "int" and not zeros and bits == 8 and block is not None and format != "pack-quantized":
        return f"int8-{_size(block)}-bfloat16"
    if kind == "int" and not zeros and bits == 8 and block is not None and block[0] == 1:
        return f"uint8b128-{_size(block)}-bfloat16"
    if kind == "int" and bits == 4 and block is not None and block[0] == 1 and format in ("pack-quantized", ""):
        order = weights.get("actorder") not in (None, False, "static", "weight") and block[1]
        return f"int4-{block[1] or 'row'}-bfloat16{'-zeros' if zeros else ''}{'-order' if order else ''}"
    shown = {name: weights.get(name) for name in ("num_bits", "type", "strategy", "group_size", "symmetric")}
    raise _open(made.where, f"weights are {format or 'compressed'} with {shown}")


# Names of modelopt; those with activations of fewer bits store weights alike.
_ALGORITHMS = {
    "FP8": "e4m3-tensor-float32",
    "FP8_PER_CHANNEL_PER_TOKEN": "e4m3-row-float32",
    "FP8_PB_WO": "e4m3-128x128-float32",
    "FP8_PB_REAL": "e4m3-128x128-float32",
    "MXFP8": "e4m3-1x32-e8m0",
    **dict.fromkeys(("NVFP4", "W4A16_NVFP4", "W4A8_NVFP4_FP8"), "nvfp4"),
    **dict.fromkeys(("MXFP4", "W4A16_MXFP4", "W4A8_MXFP4_FP8"), "mxfp4"),
}


def _algorithm(name: str, said: Mapping[str, Any], made: Formats) -> str:
    encoding = _ALGORITHMS.get(name)
    if encoding is None:
        raise _open(made.where, f"weights are {name!r} by modelopt")
    group = said.get("group_size")
    if encoding in ("nvfp4", "mxfp4") and group not in (None, 16 if encoding == "nvfp4" else 32):
        raise _open(made.where, f"weights are {name!r} by modelopt in groups of {group}")
    return encoding


def _modelopt(said: Mapping[str, Any], made: Formats) -> Formats:
    algorithm = str(said.get("quant_algo") or "")
    rules = list(_layers(said, made))
    if algorithm not in ("", "MIXED_PRECISION"):
        rules.append(Rule((_LINEAR,), _algorithm(algorithm, said, made)))
    elif not rules:
        for group in _groups(said):
            encoding = _of_group(group.get("weights"), "", made)
            rules.append(Rule(_targets(group), {"nvfp4_divided": "nvfp4"}.get(encoding or "", encoding)))
    if not rules:
        raise _open(made.where, f"weights are {algorithm or 'quantized'} by modelopt, and lists no layers")
    return _with(made, rules=tuple(rules), head=True)


def _layers(said: Mapping[str, Any], made: Formats) -> Iterator[Rule]:
    """A rule for each layer that modelopt lists by its name."""
    layers = said.get("quantized_layers")
    for name, values in layers.items() if isinstance(layers, Mapping) else ():
        yield Rule((str(name),), _algorithm(str(values.get("quant_algo")), values, made))


def _of_words(said: Mapping[str, Any], made: Formats, names: Mapping[int, str], method: str) -> str:
    """`names`: of the codes, by bits."""
    bits = next((said[key] for key in ("bits", "w_bit", "num_bits") if key in said), None)
    group = next((said[key] for key in ("group_size", "q_group_size") if key in said), None)
    if type(bits) is not int or bits not in names or type(group) is not int:
        raise _open(made.where, f"weights are {method} of {bits} bits in groups of {group}")
    return f"{names[bits]}-{'row' if group <= 0 else group}-float16"


def _awq(said: Mapping[str, Any], made: Formats) -> Formats:
    version = str(said.get("version") or "gemm").lower()
    if version != "gemm":
        raise _open(made.where, f"weights are AWQ in the version {version!r}")
    return _with(made, rules=(Rule((_LINEAR,), _of_words(said, made, {4: "awq"}, "awq")),))


def _of_gptq(said: Mapping[str, Any], made: Formats, layout: str) -> str:
    names = {4: layout, 8: layout.replace("gptq", "gptq8")}
    encoding = _of_words(said, made, names, layout)
    ordered = said.get("desc_act") and not said.get("static_groups") and "-row-" not in encoding
    return f"{encoding}-order" if ordered else encoding


def _gptq(said: Mapping[str, Any], made: Formats) -> Formats:
    layout = str(said.get("checkpoint_format") or "gptq")
    if layout not in ("gptq", "gptq_v2"):
        raise _open(made.where, f"weights are GPTQ as {layout!r}")
    encoding = _of_gptq(said, made, layout)
    rules, plain = [Rule((_LINEAR,), encoding)], list(made.plain)
    for pattern, values in (said.get("dynamic") or {}).items():
        if pattern.startswith("-:"):
            plain.append(f"re:{pattern[2:]}")
        else:
            own = _of_gptq({**said, **values}, made, layout)
            rules.append(Rule((f"re:{pattern.removeprefix('+:')}",), own))
    only = _only(said.get("modules_in_block_to_quantize"))
    if only:
        rules[0] = Rule(only, encoding)
    return _with(made, rules=tuple(rules), plain=tuple(plain), head=bool(said.get("lm_head")))


def _only(names: Any) -> tuple[str, ...]:
    """Names in lists within lists."""
    if isinstance(names, str):
        return (names,)
    return tuple(name for each in names or () for name in _only(each)) if isinstance(names, Iterable) else ()


_METHODS: dict[str, Callable[[Mapping[str, Any], Formats], Formats]] = {
    "fp8": _fp8,
    "mxfp8": _fp8,
    "fbgemm_fp8": _fp8,
    "mxfp4": _mxfp4,
    "compressed-tensors": _compressed_tensors,
    "awq": _awq,
    "gptq": _gptq,
    "emoe": _emoe,
}
