"""The ways in: `from_pretrained` for a checkpoint, `wrap` for a model in memory. Both end in a `Runtime`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from emoe.compute.device import Device, open_device
from emoe.compute.misses import MISS_MODES
from emoe.errors import ConfigError
from emoe.planning.plan import Plan, plan_for_model
from emoe.planning.plan import plan as plan_of
from emoe.routing import parse_options
from emoe.routing.options import Bias
from emoe.runtime import Runtime
from emoe.seam import load
from emoe.slots.options import PERIOD, SLACK
from emoe.store import ExpertStore
from emoe.store.writer import write_store

KERNELS = ("native", "stock")


def _choose(name: str, value: str, choices: tuple[str, ...]) -> str:
    if value not in choices:
        raise ConfigError(f"{name}={value!r} is not one of: {', '.join(choices)}")
    return value


def from_pretrained(
    path_or_id: str | Path,
    *,
    memory_budget: int | str | float = "auto",
    routing: str = "exact",
    bias: Bias | None = None,
    max_substituted_mass: float | None = None,
    kernels: str = "native",
    dtype: Any = "auto",
    context: int = 2048,
    batch: int = 1,
    policy: str = "lru",
    predictor: Any = None,
    period: int | str = PERIOD,
    slack: float = SLACK,
    prefetch: Any = None,
    sensitivity: Any = None,
    reader: str = "auto",
    device: str = "cpu",
    pinned_memory: int | str | None = None,
    miss: str = "load",
    **kwargs: Any,
) -> Any:
    """Loads a Transformers MoE model inside a byte budget; experts stay on disk and are read into slots when routed to.

    Args:
        path_or_id: a checkpoint folder, or a hub id that Transformers resolves.
        memory_budget: bytes ("8GiB", an int) for everything the model keeps in memory: other weights, expert slots,
            staging and the KV cache of `context` tokens times `batch`; a float in (0, 1] is a share of the routed
            experts; "auto" takes what is free now less a reserve, and logs what it took.
        routing: what happens to a routed expert that is not in memory. "exact": it is read first. "resident": the
            router's next choice among those in memory takes its place. "biased": those in memory have a bonus of
            `bias`, what is routed to all the same is read (docs/routing.md).
        bias: for "biased", in ranges of the router's selection key: 0 is exact, inf is resident; a number, or one per
            task ({"code": 0.2, "default": 0.5}).
        max_substituted_mass: for "resident" and "biased": the largest mean share of router mass, in [0, 1], that may be
            substituted in a request; beyond it experts are read.
        kernels: "native", or "stock" for Transformers' own eager loop on the slots (the parity reference).
        dtype: as in Transformers.
        context: tokens of KV cache the plan leaves room for, per sequence.
        batch: sequences that run at once.
        policy: eviction policy of the slots; see `emoe.slots.policy`.
        predictor: what chooses the experts to keep (docs/residency.md): "recent", a file of `emoe train-predictor`, an
            `emoe.ExpertPredictor`, or None: the policy alone.
        period: requests between two choices, or "adaptive": when observed routing drifts.
        slack: share of a layer's slots that stays with the policy; not used in `resident`.
        prefetch: what names experts of the next layer while one computes: "look-ahead", a predictor or a file of one
            that has `next_layer`, or None.
        sensitivity: layers in which a task does not count: a file of `emoe profile sensitivity`, a
            `SensitivityProfile`, or None.
        reader: "auto", "uring" or "pread".
        device: "cpu", or "cuda" / "cuda:1": the model and the slots are in that GPU's memory, which `memory_budget`
            then counts; experts come through pinned memory of the host (docs/cuda.md).
        pinned_memory: bytes of pinned host memory in front of the disk, with a device only. None: room for every
            expert, or half of the host memory that is free where that is less.
        miss: with a device, a routed expert without a slot: "load" moves it; "cpu" computes it on the CPU, from pinned
            memory; "auto" does what is sooner done. "cpu" and "auto" give results that depend on the budget.
        kwargs: handed to Transformers' `from_pretrained`.

    Returns:
        The Transformers model, in evaluation mode and with gradients off; `model.emoe` is its `Runtime`.

    Raises:
        BudgetError: the budget is too small; names the smallest that works.
        UnsupportedModelError: the model has no experts that emoe can manage.
        CheckpointError: a file is missing, truncated or corrupt.
        ConfigError: an option is not one of its choices.
    """
    options = parse_options(routing, bias, max_substituted_mass)
    gpu, memory_budget = _open(device, memory_budget, kernels=kernels, miss=miss)
    plan = plan_of(
        path_or_id, memory_budget, dtype=dtype, context=context, batch=batch, calibrate=False, **_plan_options(kwargs)
    )
    model, store = load.load_without_experts(path_or_id, dtype=dtype, **kwargs)
    return _start(
        model, store, plan, kernels=kernels, routing=options, policy=policy, reader=reader, wrapped=False,
        device=gpu, pinned_memory=pinned_memory, miss=miss,
        predictor=predictor, period=period, slack=slack, prefetch=prefetch, sensitivity=sensitivity,
    )  # fmt: skip


def _plan_options(kwargs: dict[str, Any]) -> dict[str, Any]:
    known = ("config", "trust_remote_code", "revision", "cache_dir", "subfolder", "token", "local_files_only")
    return {name: kwargs[name] for name in known if name in kwargs}


def wrap(
    model: Any,
    *,
    memory_budget: int | str | float = "auto",
    routing: str = "exact",
    bias: Bias | None = None,
    max_substituted_mass: float | None = None,
    kernels: str = "native",
    store: str | Path | None = None,
    context: int = 2048,
    batch: int = 1,
    policy: str = "lru",
    predictor: Any = None,
    period: int | str = PERIOD,
    slack: float = SLACK,
    prefetch: Any = None,
    sensitivity: Any = None,
    reader: str = "auto",
    device: str = "cpu",
    pinned_memory: int | str | None = None,
    miss: str = "load",
) -> Any:
    """Puts a model that is in memory already inside a byte budget: its experts move to a store, their memory is freed.

    Args:
        model: a Transformers model whose family goes through the experts interface; it is changed in place.
        memory_budget, routing, bias, max_substituted_mass, kernels, context, batch, policy, predictor, period, slack,
            prefetch, sensitivity, reader, device, pinned_memory, miss: as in `from_pretrained`.
        store: a folder for the experts (kept by you), None for a temporary folder, or "ram" for anonymous memory.

    Returns:
        The same model; `model.emoe.close()` restores it.

    Raises:
        StoreError: the experts could not be written; the model is left as it was.
        BudgetError, UnsupportedModelError, ConfigError: as in `from_pretrained`.
    """
    options = parse_options(routing, bias, max_substituted_mass)
    gpu, memory_budget = _open(device, memory_budget, kernels=kernels, miss=miss)
    if getattr(model, "emoe", None) is not None:
        raise ConfigError("this model already runs under emoe; call model.emoe.close() first")
    plan = plan_for_model(model, memory_budget, context=context, batch=batch)
    in_ram = store == "ram"
    expert_store = write_store(model, folder=None if store is None or in_ram else Path(store), ram=in_ram)
    load.detach_experts(model, expert_store.layers)
    return _start(
        model, expert_store, plan, kernels=kernels, routing=options, policy=policy, reader=reader, wrapped=True,
        device=gpu, pinned_memory=pinned_memory, miss=miss,
        predictor=predictor, period=period, slack=slack, prefetch=prefetch, sensitivity=sensitivity,
    )  # fmt: skip


def _open(
    device: str, memory_budget: int | str | float, *, kernels: str, miss: str
) -> tuple[Device | None, int | str | float]:
    """The device, None for the CPU, and the budget, where "auto" is what a device has free."""
    _choose("kernels", kernels, KERNELS)
    _choose("miss", miss, MISS_MODES)
    gpu = open_device(device)
    return gpu, gpu.free_bytes() if gpu is not None and memory_budget == "auto" else memory_budget


def _start(model: Any, store: ExpertStore, plan: Plan, *, wrapped: bool, **options: Any) -> Any:
    """Attaches a runtime; on any failure a wrapped model gets its experts back and nothing stays open."""
    try:
        model.emoe = Runtime(model, store, plan, wrapped=wrapped, **options)
    except BaseException:
        if wrapped:
            load.attach_experts(model, store)
        store.close()
        raise
    return model
