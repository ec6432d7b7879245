"""The `quantization_config` of a converted checkpoint: the field's own where it has one for what was written."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from emoe.convert.plan import Conversion
from emoe.model.structure import experts_modules
from emoe.options import FP8
from emoe.store.declared import OWN_METHOD, OWN_REST

_OF_EXPERTS = ("expert_dtype", "moe_quant_algo")  # what a config says of experts apart, which are others now


def quantization(
    plan: Conversion, meta_model: Any, experts: str, rest: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """What readers are told; emoe goes by the tensors themselves.

    Args:
        meta_model: the model on the meta device.
        experts: what was asked for.
        rest: what was said of encodings before, where weights outside experts stay encoded.
    """
    made = [each for shard in plan.shards for each in shard.tensors if each.matrix is not None]
    encoded = [each for each in made if each.plane != "values"]
    names = {each.as_ for each in encoded}
    if rest is not None:
        rest = {name: value for name, value in rest.items() if name not in _OF_EXPERTS}
        return {"quant_method": OWN_METHOD, "experts": experts, "encodings": sorted(names), OWN_REST: rest}
    if plan.rest_encoded:
        linears = {each.as_ for shard in plan.shards for each in shard.tensors if each.entry is not None and each.as_}
        return {"quant_method": OWN_METHOD, "experts": experts, "encodings": sorted(names | linears)}
    outside = _outside_experts(meta_model)
    if names == {FP8} and not any(each.matrix.flipped for each in encoded if each.matrix):
        return {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "activation_scheme": "dynamic",
            "weight_block_size": [128, 128],
            "modules_to_not_convert": outside,
        }
    if names == {"mxfp4"} and all(each.matrix.expert is not None for each in encoded if each.matrix):
        kept = sorted({each.name.removesuffix(".weight") for each in made if each.plane == "values"})
        return _compressed_tensors([*outside, *kept])
    whole = all(each.matrix.vector for each in made if each.matrix and each.plane == "values")
    if names == {"mxfp4"} and whole and meta_model.config.model_type == "gpt_oss":
        return {"quant_method": "mxfp4", "modules_to_not_convert": outside}
    return {"quant_method": OWN_METHOD, "experts": experts, "encodings": sorted(names)}


def _compressed_tensors(ignore: list[str]) -> dict[str, Any]:
    weights = {
        "num_bits": 4,
        "type": "float",
        "strategy": "group",
        "group_size": 32,
        "symmetric": True,
        "dynamic": False,
        "scale_dtype": "torch.uint8",
    }
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None, "format": "mxfp4-pack-quantized"}
    return {
        "quant_method": "compressed-tensors",
        "format": "mxfp4-pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ignore,
    }


def _outside_experts(meta_model: Any) -> list[str]:
    """Modules that multiply by a matrix and are not the routed experts: linear layers and routers."""
    inside = tuple(f"{path}." for path, _ in experts_modules(meta_model))
    return [
        path
        for path, module in meta_model.named_modules()
        if not path.startswith(inside)
        and not isinstance(module, nn.Embedding)
        and getattr(module._parameters.get("weight"), "ndim", 0) == 2
    ]
