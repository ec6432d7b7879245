"""The ways in: `from_pretrained` for a checkpoint, `wrap` for a model in memory. Both end in a `Runtime`.

All that can be refused is refused before weights are loaded or experts written.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from emoe.compute import ops
from emoe.compute.bank import take_down
from emoe.compute.choose import open_device
from emoe.compute.device import Device
from emoe.errors import ConfigError
from emoe.model import structure
from emoe.model.config import read_config
from emoe.options import Options, takes, unknown_option
from emoe.planning.plan import Plan, plan_checkpoint, plan_for_model
from emoe.routing import find_routers
from emoe.runtime import Runtime
from emoe.seam import load
from emoe.seam.elsewhere import GIVEN_UP
from emoe.seam.linear import Dense
from emoe.seam.plain_linear import Plain
from emoe.seam.untouched import Untouched
from emoe.slots.options import opened
from emoe.store import ExpertStore
from emoe.store.writer import write_store


@takes("load")
def from_pretrained(path_or_id: str | Path, **kwargs: Any) -> Any:
    """Loads a Transformers MoE model inside a byte budget; experts stay on disk and are read into slots when routed to.

    Args:
        path_or_id: a checkpoint folder, a GGUF file (any part of several), or a hub id that Transformers resolves.
        {options}
        kwargs: values of the config (num_hidden_layers=2), which plan and model then have, and what Transformers'
            `from_pretrained` takes: config (an object, a folder or a JSON file), revision, trust_remote_code,
            attn_implementation, gguf_file (a file in the folder or of the hub id), ...; a device_map that names one
            device is `device`. `auto_class` is the class of Transformers to load with or its name
            ("AutoModelForImageTextToText"), where it is not the one in the config's `architectures`.

    Returns:
        The Transformers model, in evaluation mode and with gradients off; `model.emoe` is its `Runtime`.

    Raises:
        BudgetError: the budget is too small; names the smallest that works.
        UnsupportedModelError: the model has no experts that emoe can manage.
        CheckpointError: a file is missing, truncated or corrupt.
        ConfigError: an option is not one of its choices, or there is no such option.
    """
    options, rest = Options.split(kwargs, "load")
    config, rest = read_config(path_or_id, rest)
    device = open_device(options.device)
    plan = plan_checkpoint(path_or_id, options, calibrate=False, free=device.free_bytes, config=config, **rest)
    options = _prepared(options, plan, device)
    dense = Dense(ops.linear, plain=options.dense_plain) if options.keeps_encoded else None
    model, store = load.load_without_experts(path_or_id, dtype=options.dtype, dense=dense, config=config, **rest)
    return _start(model, store, plan, options, device=device, dense=dense)


@takes("wrap")
def wrap(model: Any, **kwargs: Any) -> Any:
    """Puts a model that is in memory already inside a byte budget: its experts move to a store, their memory is freed.

    Args:
        model: a Transformers model whose family goes through the experts interface, or a PEFT model around one whose
            adapters are not on its experts; it is changed in place.
        {options}

    Returns:
        The same model; `model.emoe.close()` restores it.

    Raises:
        StoreError: the experts could not be written; the model is left as it was.
        BudgetError, UnsupportedModelError, ConfigError: as in `from_pretrained`; nothing was written.
    """
    options, unknown = Options.split(kwargs, "wrap")
    for name in unknown:
        raise unknown_option(name, "wrap")
    _require_experts(model)
    given, model = model, structure.without_adapters(model)
    if not isinstance(model, nn.Module) or not hasattr(model, "config"):
        inside = "; give its .module" if isinstance(getattr(model, "module", None), nn.Module) else ""
        raise ConfigError(f"wrap takes a model of Transformers, or a PEFT model around one, not {type(model)}{inside}")
    device = open_device(options.device)
    plan = plan_for_model(model, options, free=device.free_bytes)
    options = _prepared(options, plan, device, model)
    folder = None if options.store in (None, "ram") else Path(options.store)
    before = Untouched(model, [module for _, module in structure.find_experts(model)])
    expert_store = write_store(model, folder=folder, ram=options.store == "ram")
    _start(model, expert_store, plan, options, before=before, device=device)
    return given


def _require_experts(model: Any) -> None:
    runtime = getattr(model, "emoe", None)
    if not runtime:
        return
    if isinstance(runtime, Runtime) and runtime.closed:
        raise ConfigError(f"this model has no experts to run: {GIVEN_UP}")
    raise ConfigError("this model already runs under emoe; call model.emoe.close() first")


def _prepared(options: Options, plan: Plan, device: Device, model: Any = None) -> Options:
    """Options with their files opened, after what machine and model may refuse; `model` where it is here already."""
    device.module.make_reader(options.reader)
    device.check_pinned(options.pinned_memory, sum(plan.experts_per_layer), plan.slot_bytes)
    if model is not None and options.routing in ("resident", "biased"):
        find_routers(model)
    return opened(options, len(plan.experts_per_layer), max(plan.experts_per_layer), model)


def _start(
    model: Any, store: ExpertStore, plan: Plan, options: Options, *, device: Device, dense: Dense | None = None,
    before: Untouched | None = None,
) -> Any:  # fmt: skip
    """Attaches a runtime; on any failure nothing stays open.

    Args:
        before: of a model whose experts are still in it, besides in the store; it is that again on any failure.
    """
    try:
        if before is not None:
            load.detach_experts(model, store.layers)
        plain = Plain(ops.plain_linear, *ops.plain_dtypes(options.dense if options.keeps_encoded else "torch"))
        model.emoe = Runtime(model, store, plan, options, device=device, dense=dense, plain=plain)
    except BaseException:
        steps: list[Callable[[], object]] = []
        if before is not None:
            steps = [before.restore, partial(load.attach_experts, model, store)]
        take_down([*steps, store.close])
        raise
    return model
