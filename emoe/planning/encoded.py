"""What the weights of a quantized checkpoint are before anything is loaded: by the headers of its files, or a config.

Headers decide, as when the model is loaded. Where there are none (a folder with config.json alone, a hub id that cannot
be asked), what the config says is taken for true, and the plan says so.
"""

from __future__ import annotations

import fnmatch
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from emoe.errors import UnsupportedModelError
from emoe.model import structure
from emoe.model.config import without_quantization
from emoe.model.encoding import EncodedMatrix, encoding
from emoe.model.spec import ExpertForm, ParamSpec
from emoe.store.checkpoint import Forms, encoded_forms
from emoe.store.headers import INDEX_NAME, SINGLE_NAME, TensorEntry, checkpoint_files, read_headers, remote_headers

ASSUMED = "there are no weights here to tell: encodings are those of config.json"


def forms(path_or_id: str | Path, model: Any, config: Any, places: Mapping[str, Any]) -> tuple[Forms | None, str]:
    """What weights are, None where all are plain, and a note for the plan or "".

    Args:
        path_or_id: of the checkpoint.
        model: on the meta device.
        config: of the checkpoint, with what it says of encodings.
        places: where Transformers looks for files (`subfolder`, `revision`, `token`).

    Raises:
        CheckpointError, UnsupportedModelError: as `emoe.store.checkpoint.read_checkpoint`.
    """
    _, quantization = without_quantization(config)
    if Path(path_or_id).is_dir():
        folder = Path(path_or_id) / (places.get("subfolder") or "")
        if any((folder / name).is_file() for name in (SINGLE_NAME, INDEX_NAME)):
            return encoded_forms(read_headers(checkpoint_files(folder)), model, quantization, str(folder)), ""
    elif quantization is not None:
        entries = _of_the_hub(str(path_or_id), places)
        if entries is not None:
            return encoded_forms(entries, model, quantization, str(path_or_id)), ""
    return (None, "") if quantization is None else (_assumed(model, quantization), ASSUMED)


def _of_the_hub(name: str, places: Mapping[str, Any]) -> dict[str, TensorEntry] | None:
    """Headers of the files in its cache, else of those on the hub; None where it cannot be asked."""
    from transformers.utils import cached_file

    where = {key: places[key] for key in ("cache_dir", "revision", "subfolder", "token") if places.get(key)}
    for index in (SINGLE_NAME, INDEX_NAME):
        found = cached_file(
            name, index, local_files_only=True, _raise_exceptions_for_gated_repo=False,
            _raise_exceptions_for_missing_entries=False, _raise_exceptions_for_connection_errors=False, **where,
        )  # fmt: skip
        folder = None if found is None else Path(found).parent
        if folder is not None and (index == SINGLE_NAME or _is_whole(folder)):
            return read_headers(checkpoint_files(folder))
    return remote_headers(name, revision=places.get("revision"), token=places.get("token"))


def _is_whole(folder: Path) -> bool:
    """Whether all shards that an index names are there."""
    from emoe.errors import CheckpointError

    try:
        return bool(checkpoint_files(folder))
    except CheckpointError:
        return False


def _assumed(model: Any, quantization: Mapping[str, Any]) -> Forms:
    """As the config says: every expert's weight in the one encoding, every linear layer that it does not leave out."""
    experts, linears = _encodings(quantization)
    layers = [_form(module, experts) for _, module in structure.find_experts(model)]
    return Forms(layers, _saved(model, quantization, linears))


def _encodings(said: Mapping[str, Any]) -> tuple[str, str | None]:
    """Of experts and of linear layers outside them, None where these are plain."""
    method = str(said.get("quant_method") or said.get("quant_algo") or "")
    weights: Mapping[str, Any] = next(
        (
            group["weights"]
            for group in (said.get("config_groups") or {}).values()
            if isinstance(group, Mapping) and isinstance(group.get("weights"), Mapping)
        ),
        {},
    )
    size = weights.get("group_size") or said.get("group_size") or 128
    block = said.get("weight_block_size") or weights.get("block_structure") or weights.get("weight_block_size")
    if method in ("fp8", "mxfp8"):
        scale = "e8m0" if said.get("scale_fmt") == "ue8m0" or method == "mxfp8" else "float32"
        bytes_ = f"e4m3-{block[0]}x{block[1]}-{scale}" if block else "e4m3-tensor-float32"
        return ("mxfp4" if said.get("expert_dtype") == "fp4" else bytes_), bytes_
    if method == "mxfp4":
        return "mxfp4", None
    if method == "compressed-tensors":
        kind = str(said.get("format") or "")
        scale = {"tensor": "tensor", "block": f"{block[0]}x{block[1]}" if block else "128x128"}.get(
            str(weights.get("strategy")), "row"
        )
        found = {
            "pack-quantized": f"int4-{size}-bfloat16", "nvfp4-pack-quantized": "nvfp4_divided",
            "mxfp4-pack-quantized": "mxfp4", "float-quantized": f"e4m3-{scale}-bfloat16",
            "int-quantized": f"int8-{scale}-bfloat16",
        }.get(kind)  # fmt: skip
        if found is not None:
            return found, found
    if method == "modelopt" or "quant_algo" in said:
        algorithm = str(said.get("quant_algo") or "")
        found = "nvfp4" if "NVFP4" in algorithm else "mxfp4" if "MXFP4" in algorithm else "e4m3-tensor-float32"
        return found, found
    if method in ("awq", "gptq"):
        return (f"{method}-{size if size > 0 else 'row'}-float16",) * 2
    raise UnsupportedModelError(
        f"config.json says that weights are quantized ({method or 'by an unknown method'}); emoe reads FP8, MXFP4, "
        "NVFP4, INT8, INT4, AWQ, GPTQ and blocks of GGUF, and there are no files here to tell which of them these are"
    )


def _form(module: Any, name: str) -> ExpertForm:
    """Gate and up are matrices of their own, but where they interleave."""
    params = structure.param_specs(module)
    stored: list[ParamSpec] = []
    matrices: list[EncodedMatrix] = []
    for param in params:
        if len(param.shape) != 2:
            stored.append(param)
            continue
        rows, cols = reversed(param.shape) if module.is_transposed else param.shape
        parts = 2 if param.name == "gate_up_proj" and not module.is_transposed else 1
        for number in range(parts):
            shapes = encoding(name).shapes(rows // parts, cols)
            names = {plane.name: f"{param.name}.{number}.{plane.name}" for plane in encoding(name).planes}
            stored += [ParamSpec(names[each.name], shapes[each.name], each.dtype) for each in encoding(name).planes]
            matrices.append(
                EncodedMatrix(
                    name, rows // parts, cols, names, param.name, number * rows // parts,
                    transposed=bool(module.is_transposed),
                )
            )  # fmt: skip
    plain = [each for each in stored if each in params]
    return ExpertForm(params, (*plain, *(each for each in stored if each not in params)), tuple(matrices))


def _saved(model: Any, said: Mapping[str, Any], name: str | None) -> int:
    if name is None:
        return 0
    saved = 0
    for weight in _linears(model, said):
        if all(plane.holds(*weight.shape) for plane in encoding(name).planes):
            saved += math.prod(weight.shape) * weight.dtype.itemsize - encoding(name).nbytes(tuple(weight.shape))
    return saved


def _linears(model: Any, said: Mapping[str, Any]) -> Iterator[torch.Tensor]:
    left_out = [
        str(each)
        for key in ("modules_to_not_convert", "ignored_layers", "ignore", "exclude_modules")
        for each in said.get(key) or ()
    ]
    head = model.get_output_embeddings()
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear) and module is not head and not any(_names(each, path) for each in left_out):
            yield module.weight


def _names(pattern: str, path: str) -> bool:
    """Whether an entry of such a list means a module: by name, by its end or a part, by `*`, or by `re:`."""
    if pattern.startswith("re:"):
        return re.match(pattern[3:], path) is not None
    if "*" in pattern:
        return fnmatch.fnmatch(path, pattern) or fnmatch.fnmatch(path, f"{pattern}.*")
    return f".{pattern}." in f".{path}."
