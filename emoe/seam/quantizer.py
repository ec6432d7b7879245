"""Tells Transformers to load a model without its experts, through the interface it has for quantizers.

A quantizer sees the model on the meta device before any weight is read. This one notes where the experts lie and takes
their parameters away; the tensors of the checkpoint then belong to nothing and are never read. Nothing of it stays on
the model.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from transformers.core_model_loading import WeightRenaming
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from emoe.model.structure import experts_modules, find_experts
from emoe.seam.linear import Dense
from emoe.store import ExpertStore
from emoe.store.apart import names_apart
from emoe.store.unread import Unread

METHOD = "emoe_without_experts"


@register_quantization_config(METHOD)
class WithoutExperts(QuantizationConfigMixin):
    """Handed to `from_pretrained(quantization_config=...)` by emoe; not meant for configs on disk.

    Args:
        make: gives the store of the experts, called with the model on the meta device, its experts' parameters
            included, and the files that Transformers found (none where it is handed a state dict).
        dense: what of the rest stays encoded; None for nothing.
    """

    def __init__(
        self, make: Callable[[Any, list[str]], ExpertStore], dense: Dense | None = None, **kwargs: Any
    ) -> None:
        self.quant_method = METHOD
        self.make, self.dense = make, dense

    def __deepcopy__(self, memo: Any) -> WithoutExperts:
        return self  # Transformers copies the config that it has put this into; what is loaded is not to be copied


@register_quantizer(METHOD)
class _LeaveExpertsOut(HfQuantizer):
    def __init__(self, quantization_config: WithoutExperts, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.pre_quantized = True  # else Transformers reads every tensor in one thread

    def is_serializable(self) -> bool:
        return False

    @property
    def is_trainable(self) -> bool:
        return False

    def update_weight_conversions(self, weight_conversions: Any, model: Any) -> Any:
        return weight_conversions

    def get_new_dtype(self, converter: Any, param: Any, dtype: Any) -> Any:
        if not isinstance(param, Unread):
            return super().get_new_dtype(converter, param, dtype)
        param.dtype = dtype if param.is_float else None
        if self._kept is not None:
            if isinstance(converter, WeightRenaming):
                self._kept.keep(converter.target_patterns[0], param)
            else:
                self._kept.put_together(param)
        return param.dtype

    def _process_model_before_weight_loading(self, model: Any, checkpoint_files: Any = None, **kwargs: Any) -> Any:
        own_config = model.config.__dict__.pop("quantization_config", None)  # find_experts refuses quantized models
        find_experts(model)
        model._emoe_store = self.quantization_config.make(model, list(checkpoint_files or []))
        model.config.quantization_config = own_config
        dense = self.quantization_config.dense
        self._kept = None if dense is None else dense.of(model)
        patterns = {names_apart(path) for path, _ in experts_modules(model)}
        for layer, (path, module) in zip(model._emoe_store.layers, experts_modules(model), strict=True):
            for param in layer.params:
                module._parameters[param.name] = None
                patterns.add(re.escape(f"{path}.{param.name}"))
            module.__dict__["_is_hf_initialized"] = True  # else Transformers initializes the parameters that are gone
            around = model.get_submodule(path.rpartition(".")[0])  # qwen3_omni_moe does it from there
            if not around._parameters and not around._buffers:
                around.__dict__["_is_hf_initialized"] = True
        self._unexpected = model._keys_to_ignore_on_load_unexpected
        model._keys_to_ignore_on_load_unexpected = set(self._unexpected or ()) | patterns
        return model

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        self.remove_quantization_config(model)
        model.__dict__.pop("is_quantized", None)
        model._keys_to_ignore_on_load_unexpected = self._unexpected
        for module in model.modules():
            getattr(module, "config", model.config).__dict__.pop("_is_quantized", None)
        return model
