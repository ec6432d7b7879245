"""The experts of a model, and sizes read off it, whatever device it is on."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any, cast

from torch import nn

from emoe.errors import ConfigError, UnsupportedModelError
from emoe.model.spec import ParamSpec

_EXPERTS_FLAGS = ("num_experts", "has_gate", "has_bias", "is_transposed")  # set by Transformers' decorator
_TOP_K_NAMES = ("num_experts_per_tok", "moe_k", "moe_topk", "num_experts_per_token", "top_k_experts", "moe_top_k")


def experts_modules(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """(path, module) of every module that sends its experts through Transformers' experts interface."""
    return [
        (path, module)
        for path, module in model.named_modules()
        if all(hasattr(module, flag) for flag in _EXPERTS_FLAGS) and hasattr(type(module).forward, "__wrapped__")
    ]


def find_experts(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The experts modules of a model, in `named_modules()` order.

    Raises:
        UnsupportedModelError: there are none, or their weights are quantized; names class and families that work.
    """
    require_unquantized(getattr(model, "config", None), type(model).__name__)
    found = experts_modules(model)
    for path, module in found:
        _require_plain(path, module)
    if not found:
        config = getattr(model, "config", None)
        kind = ", an encoder-decoder," if getattr(config, "is_encoder_decoder", False) else ""
        raise UnsupportedModelError(
            f"{type(model).__name__} ({type(config).__name__}){kind} has no experts that go through Transformers' "
            f"experts interface. Families that do: {', '.join(families_that_work())}"
        )
    return found


def _require_plain(path: str, module: nn.Module) -> None:
    """UnsupportedModelError where an adapter or a parametrization computes the weights of an experts module."""
    if path.endswith(".base_layer"):
        found, remedy = "a PEFT adapter", "model.merge_and_unload() puts it into the weights"
    elif hasattr(module, "parametrizations"):
        found, remedy = (
            "a parametrization",
            "torch.nn.utils.parametrize.remove_parametrizations puts it into the weights",
        )
    elif any(name.endswith("_mask") for name in module._buffers):
        found, remedy = "a pruning mask", "torch.nn.utils.prune.remove puts it into the weights"
    else:
        return
    raise UnsupportedModelError(f"there is {found} on {path.split('.base_layer')[0]}: {remedy}; then wrap the model")


def without_adapters(model: Any) -> Any:
    """The Transformers model inside a PEFT model; any other model is given back."""
    return model.get_base_model() if hasattr(model, "peft_config") and hasattr(model, "get_base_model") else model


def require_unquantized(config: Any, name: str) -> None:
    """UnsupportedModelError where a config says that weights are quantized."""
    text_config = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else None
    for each in (config, text_config):
        quantization = getattr(each, "quantization_config", None)
        if quantization is not None:
            values = quantization if isinstance(quantization, dict) else vars(quantization)
            method = values.get("quant_method", "an unknown method")
            raise UnsupportedModelError(
                f"the weights of {name} are quantized in memory ({getattr(method, 'value', method)}); emoe takes "
                "models of plain weights, and quantized ones from their files: emoe.from_pretrained"
            )


@functools.cache
def families_that_work() -> tuple[str, ...]:
    """Model families of the installed Transformers whose sources use its experts interface."""
    import transformers

    models = Path(transformers.__path__[0]) / "models"
    return tuple(
        sorted(
            {
                source.parent.name
                for source in models.glob("*/modeling_*.py")
                if b"@use_experts_implementation" in source.read_bytes()
            }
        )
    )


def num_experts(module: nn.Module) -> int:
    """Routed experts of an experts module."""
    return cast(int, module.num_experts)


def param_specs(module: nn.Module) -> tuple[ParamSpec, ...]:
    """Name, shape of one expert and dtype of every parameter that an experts module keeps per expert."""
    return tuple(
        ParamSpec(name, tuple(parameter.shape[1:]), str(parameter.dtype).removeprefix("torch."))
        for name, parameter in module._parameters.items()
        if parameter is not None and parameter.shape[0] == module.num_experts
    )


def unique_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers, tied ones once."""
    return sum(
        tensor.numel() * tensor.element_size()
        for tensor in (*model.parameters(), *model.buffers())  # parameters() gives shared ones once
    )


def top_k(model: Any) -> int:
    """Experts a token is routed to.

    Raises:
        ConfigError: the config's number is none from 1 to that of the experts; names it and the range.
        UnsupportedModelError: the config names it in a way emoe does not know.
    """
    config = model.config.get_text_config(decoder=True)
    for name in _TOP_K_NAMES:
        value = getattr(config, name, None)
        if value is None:
            continue
        most = min((num_experts(module) for _, module in experts_modules(model)), default=0)
        if type(value) is not int or not 1 <= value <= most:
            raise ConfigError(
                f"{name}={value!r} of {type(config).__name__} is no number of experts from 1 to {most}, those there are"
            )
        return value
    raise UnsupportedModelError(
        f"{type(config).__name__} says nowhere how many experts a token uses; looked for {', '.join(_TOP_K_NAMES)}"
    )
