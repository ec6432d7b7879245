"""What fits: bytes of each kind, slots per layer and a forecast, from the config alone, before anything is loaded."""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from emoe.errors import BudgetError, ConfigError
from emoe.memory import available_memory, format_bytes
from emoe.model import dense, layout, structure, summary
from emoe.model.config import read_config
from emoe.model.copies import CopyLayout
from emoe.model.encoding import encoding
from emoe.model.spec import PAGE, ExpertForm
from emoe.options import Budget, Options, parse_budget, takes
from emoe.planning import activations, bandwidth, copies, encoded, kv_cache
from emoe.planning.encoded import Stored
from emoe.planning.meta import meta_model
from emoe.store.checkpoint import Sizes

logger = logging.getLogger(__name__)

# Bounce buffers of the transfer workers plus scratch of the kernels (docs/transfer.md, docs/kernels.md).
STAGING_BYTES = 24 << 20
# What Transformers imports and touches of libraries when it runs any model, over a bare `import torch, transformers`
# (benchmarks/budget.py prints it: 121 MiB, of which 85 are Python modules, torch.distributed and sympy among them;
# docs/architecture.md). Budgets up to LIBRARIES_FROM are the model's alone; what exceeds that goes to libraries first.
LIBRARIES_BYTES = 128 << 20
LIBRARIES_FROM = 128 << 20
# memory_budget="auto" leaves this much of what is free to everybody else, on every device: a tenth, or 1 GiB where that
# is more; where little is free, as in a small container, an eighth of it, and this much at least.
AUTO_RESERVE_BYTES = 1 << 30
AUTO_RESERVE_SHARE = 0.1
AUTO_RESERVE_LEAST = 128 << 20

# Hit rate of a per-layer LRU at a resident share, middle of the range over four domains of public Qwen3-30B traces
# (docs/slots.md; `emoe replay` prints such figures for any trace). Used for the optimistic end of the forecast.
RECURRENT_HIT_RATE = ((0.0, 0.0), (0.2, 0.75), (0.3, 0.84), (0.4, 0.90), (0.5, 0.945), (1.0, 1.0))


@dataclass(frozen=True)
class Plan:
    """How a model is laid out in a budget. Bytes unless named otherwise.

    `dtype` is the one that the model runs in, `encodings` are those that its experts are stored in; `experts` says of
    layers that are alike: their numbers, the encoding of gate, up and down, bytes_per_expert, and the kernels that
    compute them on a CPU ("native", or "stock" and the reason). `activation_bytes` is what a prompt's chunk of
    `prefill_chunk` tokens a sequence takes at the end of a full context; None: prompts are computed whole.
    `coarse` names the encoding of the copies of all experts that routing coarse keeps in memory, `copy_bytes` is what
    they take, and `copy_layouts` says how they lie; None where there are none.
    `library_bytes` of the budget are left to what torch and Transformers take when they run any model: 128 MiB, less in
    budgets under 256 MiB, and none up to 128 MiB or on a GPU. `layouts` says of each layer where an expert's parameters
    lie in a slot. Layouts are not in `to_dict`.

    What is on the disk is as `source` says: "headers" of the files, the "config" where there are none, or "model" where
    the model is in memory (`emoe.wrap`) and there is no checkpoint (None). `checkpoint_bytes` are all its tensors,
    among them `not_loaded_bytes` of parts that the model does not have, and `encoded_bytes` of weights outside experts,
    which in memory are decoded and take `decoded_bytes`; those that stay encoded, `kept_bytes` in
    `kept_encodings`, are in neither. Outside experts `non_expert_bytes` are in memory, and `non_expert_stored_bytes` on
    the disk.
    """

    model: str
    dtype: str
    encodings: tuple[str, ...]
    budget_bytes: int
    non_expert_bytes: int
    non_expert_stored_bytes: int
    expert_bytes: int
    bytes_per_expert: int
    slot_bytes: int
    slots_per_layer: tuple[int, ...]
    experts_per_layer: tuple[int, ...]
    top_k: int
    kv_bytes: int
    staging_bytes: int
    activation_bytes: int
    prefill_chunk: int | None
    library_bytes: int
    context: int
    batch: int
    smallest_budget: int
    tokens_per_second: tuple[float, float] | None
    notes: tuple[str, ...]
    warnings: tuple[str, ...]
    source: str = "model"
    checkpoint_bytes: int | None = None
    not_loaded_bytes: int = 0
    encoded_bytes: int = 0
    decoded_bytes: int = 0
    kept_bytes: int = 0
    kept_encodings: tuple[str, ...] = ()
    experts: tuple[dict[str, Any], ...] = ()
    layouts: tuple[layout.SlotLayout, ...] = field(default=(), repr=False)
    coarse: str | None = None
    copy_bytes: int = 0
    copy_layouts: tuple[CopyLayout, ...] = field(default=(), repr=False)

    @property
    def model_bytes(self) -> int:
        """Weights of the whole model, encoded ones as they are stored."""
        return self.non_expert_stored_bytes + self.expert_bytes

    @property
    def decoded(self) -> dict[str, Any] | None:
        """What outside experts is encoded on the disk and not in memory, and why; None where there is nothing."""
        if not self.encoded_bytes:
            return None
        why = f"torch computes with these weights outside experts, in {self.dtype}"
        return {"stored_bytes": self.encoded_bytes, "bytes": self.decoded_bytes, "why": why}

    @property
    def slab_bytes(self) -> int:
        """All slots together."""
        return sum(self.slots_per_layer) * self.slot_bytes

    @property
    def planned_bytes(self) -> int:
        """What the model will take: weights outside experts, slots, copies, staging, KV cache, activations."""
        fixed = self.non_expert_bytes + self.staging_bytes + self.kv_bytes + self.activation_bytes
        return fixed + self.slab_bytes + self.copy_bytes

    @property
    def resident_share(self) -> float:
        """Slots over routed experts, 0 to 1."""
        return sum(self.slots_per_layer) / sum(self.experts_per_layer)

    def stats(self) -> dict[str, Any]:
        """Its part of `Runtime.stats`."""
        names = ("resident_share", "budget_bytes", "encodings", "decoded")
        return {name: getattr(self, name) for name in names}

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        values = asdict(replace(self, layouts=(), copy_layouts=()))
        del values["layouts"], values["copy_layouts"]
        return {
            **values,
            "model_bytes": self.model_bytes,
            "decoded": self.decoded,
            "slab_bytes": self.slab_bytes,
            "planned_bytes": self.planned_bytes,
            "resident_share": self.resident_share,
        }


@takes("plan")
def plan(
    path_or_id: str | Path,
    memory_budget: int | str | float = Options.memory_budget,
    *,
    calibrate: bool = True,
    free: Callable[[], int] = available_memory,
    **kwargs: Any,
) -> Plan:
    """Says what `from_pretrained` would do with this budget; loads no weights.

    Args:
        path_or_id: a checkpoint folder, a GGUF file (any part of several), or a hub id that Transformers resolves.
        {options}
        calibrate: measure memory and disk rates for the forecast (about a second, then cached).
        free: bytes that are free where the slots will be, for "auto"; the host's memory unless said otherwise.
        kwargs: what else `from_pretrained` takes, values of the config (num_hidden_layers=2) and auto_class among it.

    Raises:
        BudgetError: the budget is too small; names the smallest that works.
        UnsupportedModelError: the model has no experts that emoe can manage.
        CheckpointError: there is no such folder, or no config in it.
        ConfigError: an option is not one of its choices.
    """
    options, rest = Options.split({**kwargs, "memory_budget": memory_budget}, "load")
    if options.device != "cpu" and parse_budget(options.memory_budget).kind == "auto":
        raise ConfigError(
            f"memory_budget='auto' with device={options.device!r} is what is free there when the model is loaded; "
            "a plan before that needs bytes or a share"
        )
    return plan_checkpoint(path_or_id, options, calibrate=calibrate, free=free, **rest)


def plan_checkpoint(
    path_or_id: str | Path,
    options: Options,
    *,
    calibrate: bool,
    free: Callable[[], int] = available_memory,
    **kwargs: Any,
) -> Plan:
    """`plan` with options that are checked; kwargs as `emoe.model.config.read_config` takes them."""
    config, rest = read_config(path_or_id, kwargs)
    model = meta_model(path_or_id, dtype=options.dtype, config=config, **rest)
    stored = encoded.stored(path_or_id, model, config, rest)
    here = Path(path_or_id)
    folder = here if here.is_dir() else here.parent if here.is_file() else None
    rates = bandwidth.measure(folder) if calibrate else None
    return _plan(model, str(path_or_id), options, rates, free, stored)


def plan_for_model(model: Any, options: Options, *, free: Callable[[], int] = available_memory) -> Plan:
    """The plan for a model that is in memory already (`emoe.wrap`)."""
    return _plan(model, type(model).__name__, options, None, free)


def _plan(
    model: Any,
    name: str,
    options: Options,
    rates: bandwidth.Rates | None,
    free: Callable[[], int],
    stored: Stored | None = None,
) -> Plan:
    """`stored` is how the checkpoint lies on the disk; None where the model is in memory."""
    budget, free = parse_budget(options.memory_budget), functools.cache(free)
    found = structure.find_experts(model)
    top_k = structure.top_k(model)
    specs = [structure.param_specs(module) for _, module in found]
    forms = (stored and stored.forms.experts) or [ExpertForm.plain(params) for params in specs]
    layouts = tuple(layout.describe(module, form) for (_, module), form in zip(found, forms, strict=True))
    slot_bytes = _round_up(max(each.nbytes for each in layouts), PAGE)
    experts = tuple(structure.num_experts(module) for _, module in found)
    bytes_of = [form.nbytes for form in forms]
    expert_bytes = sum(count * size for count, size in zip(experts, bytes_of, strict=True))
    whole = {} if stored is None else stored.forms.whole
    kept = dense.kept(model, whole, options.dense_plain) if options.keeps_encoded else {}
    non_expert = rest_bytes(model, kept)
    encoded_bytes, decoded_bytes = _decoded(model, stored, kept) if stored else (0, 0)
    sizes = stored.forms.sizes if stored else Sizes(0, 0)
    kv, kv_note = kv_cache.measure(model, context=options.context, batch=options.batch)
    prefill = activations.plan_prefill(
        model, options.prefill_chunk, context=options.context, batch=options.batch,
        model_bytes=structure.unique_bytes(model),
        native=options.kernels == "native" and all(each.native is not None for each in layouts),
    )  # fmt: skip
    fixed = non_expert + STAGING_BYTES + kv + prefill.nbytes
    libraries = _Libraries(options.device)
    coarse = None
    room = _room(budget, fixed, libraries, free)
    masses = options.exact_masses.values()
    all_slots = slot_bytes * sum(experts)
    fits = budget.share >= 1 if room is None else room >= all_slots
    if options.routing == "coarse" and not fits and max(masses) > 0:
        reasons = [each.reason for each in layouts]
        beside = None if room is None else room - slot_bytes * top_k * len(experts)
        coarse = copies.choose(options.coarse, found, forms, reasons, experts, beside)
        fixed += coarse.nbytes
    smallest = libraries.beside(fixed + len(experts) * slot_bytes)
    notes = [note for note in (stored.note if stored else "", kv_note) if note]
    if (more := decoded_bytes - encoded_bytes) > 0:
        notes.append(
            f"weights outside experts take {format_bytes(more)} more than in their files: "
            f"{'some' if kept else 'they'} are decoded to {specs[0][0].dtype} when they are loaded; experts stay as "
            "they are"
        )
    notes += prefill.notes
    if options.routing == "coarse" and coarse is None:
        why = "all experts fit into slots" if fits else "exact_mass=0 has every expert read before it is computed"
        notes.append(f"{why}: routing='coarse' makes no copies, and is exact")
    slots, nbytes = _slots(
        budget, fixed, slot_bytes, experts, smallest, name, notes, free, prefill.spare, libraries,
        copies=coarse.nbytes if coarse else 0,
    )  # fmt: skip
    if coarse and (both := coarse.nbytes + slot_bytes * sum(slots)) > all_slots:
        notes.append(
            f"copies and slots take {format_bytes(both)}, slots for all experts {format_bytes(all_slots)}: "
            "memory_budget=1.0 needs no copies, and is exact"
        )
    warnings = []
    if min(slots) < top_k:
        enough = libraries.beside(fixed + slot_bytes * len(experts) * top_k)
        warnings.append(
            f"{min(slots)} slots in a layer are fewer than the {top_k} experts of one token: every token reloads "
            f"experts; {format_bytes(enough)} would hold one token's"
        )
    return Plan(
        model=name,
        dtype=specs[0][0].dtype,
        encodings=tuple(dict.fromkeys(name for form in forms for name in form.encodings)),
        budget_bytes=nbytes,
        non_expert_bytes=non_expert,
        non_expert_stored_bytes=rest_bytes(model) - sizes.decoded + sizes.encoded,
        expert_bytes=expert_bytes,
        bytes_per_expert=max(bytes_of),
        slot_bytes=slot_bytes,
        slots_per_layer=slots,
        experts_per_layer=experts,
        top_k=top_k,
        kv_bytes=kv,
        staging_bytes=STAGING_BYTES,
        activation_bytes=prefill.nbytes,
        prefill_chunk=prefill.chunk,
        library_bytes=libraries.of(nbytes),
        context=options.context,
        batch=options.batch,
        smallest_budget=smallest,
        tokens_per_second=_forecast(
            rates,
            non_expert,
            bytes_of,
            slots,
            experts,
            top_k,
            copies=[each.nbytes for each in coarse.layouts] if coarse else [],
            masses=masses,
        )
        if rates
        else None,
        notes=tuple(notes + ([rates.note] if rates else [])),
        warnings=tuple(warnings),
        source=stored.source if stored else "model",
        checkpoint_bytes=sizes.nbytes if stored else None,
        not_loaded_bytes=sizes.not_loaded,
        encoded_bytes=encoded_bytes,
        decoded_bytes=decoded_bytes,
        kept_bytes=sum(encoding(how).nbytes(tuple(model.get_parameter(name).shape)) for name, how in kept.items()),
        kept_encodings=tuple(sorted(set(kept.values()))),
        experts=_summary(forms, layouts, options.kernels),
        layouts=layouts,
        coarse=coarse.name if coarse else None,
        copy_bytes=coarse.nbytes if coarse else 0,
        copy_layouts=coarse.layouts if coarse else (),
    )


def _room(budget: Budget, fixed: int, libraries: _Libraries, free: Callable[[], int]) -> int | None:
    """Bytes for experts; None where the budget is a share of them."""
    if budget.kind == "fraction":
        return None
    nbytes = _auto_bytes(free())[0] if budget.kind == "auto" else budget.nbytes
    return nbytes - libraries.of(nbytes) - fixed


def _auto_bytes(there: int) -> tuple[int, int]:
    """Of so many free bytes those that "auto" takes, and those that stay reserved."""
    reserve = max(AUTO_RESERVE_LEAST, min(AUTO_RESERVE_BYTES, there // 8), int(AUTO_RESERVE_SHARE * there))
    return max(0, there - reserve), reserve


def _summary(
    forms: Sequence[ExpertForm], layouts: Sequence[layout.SlotLayout], kernels: str
) -> tuple[dict[str, Any], ...]:
    return tuple(
        summary.alike(
            {
                "encodings": summary.encodings_of(form),
                "bytes_per_expert": form.nbytes,
                "kernels": "stock" if where.native is None else kernels,
                "reason": where.reason if kernels == "native" else "kernels='stock'",
            }
            for form, where in zip(forms, layouts, strict=True)
        )
    )


def rest_bytes(model: Any, kept: Mapping[str, str] | None = None) -> int:
    """Bytes in memory of what a model holds outside experts; `kept` is what stays encoded, as `dense.kept` gives it."""
    experts = (module for _, module in structure.experts_modules(model))
    return (
        structure.unique_bytes(model)
        - dense.saved_bytes(model, kept or {})
        - sum(
            structure.num_experts(module) * sum(param.nbytes for param in structure.param_specs(module))
            for module in experts
        )
    )


def _decoded(model: Any, stored: Stored, kept: Mapping[str, str]) -> tuple[int, int]:
    """Bytes of the encoded weights outside experts that do not stay so: in their files, and in memory."""
    stay = {id(weight := model.get_parameter(name)): (how, weight) for name, how in kept.items()
            if name in stored.forms.whole}  # fmt: skip
    sizes = stored.forms.sizes
    return (
        sizes.encoded - sum(encoding(how).nbytes(tuple(weight.shape)) for how, weight in stay.values()),
        sizes.decoded - sum(weight.nbytes for _, weight in stay.values()),
    )


class _Libraries:
    """How much of a budget on a device is left to the libraries; on a GPU nothing, as they are not there."""

    def __init__(self, device: str) -> None:
        self._most = LIBRARIES_BYTES if device == "cpu" else 0

    def of(self, budget: int) -> int:
        """Of a budget of so many bytes."""
        return min(max(0, budget - LIBRARIES_FROM), self._most)

    def beside(self, taken: int) -> int:
        """The smallest budget that leaves a model `taken` bytes."""
        return taken + (self._most if taken > LIBRARIES_FROM else 0)


def _slots(
    budget: Budget,
    fixed: int,
    slot_bytes: int,
    experts: tuple[int, ...],
    smallest: int,
    name: str,
    notes: list[str],
    free: Callable[[], int],
    spare: int,
    libraries: _Libraries,
    *,
    copies: int,
) -> tuple[tuple[int, ...], int]:
    """Slots of each layer, and the budget in bytes."""
    if budget.kind == "fraction":
        slots = tuple(max(1, math.floor(budget.share * count)) for count in experts)
        return slots, libraries.beside(fixed + sum(slots) * slot_bytes)
    if budget.kind == "auto":
        there = free()
        nbytes, reserve = _auto_bytes(there)
        notes.append(
            f"auto took {format_bytes(nbytes)}: {format_bytes(there)} are free, {format_bytes(reserve)} stay reserved"
        )
        logger.info("emoe: memory_budget=%s", notes[-1])
    else:
        nbytes = budget.nbytes
    total = (nbytes - libraries.of(nbytes) - fixed) // slot_bytes
    if total < len(experts):
        how = f"; {notes[-1]}, and memory_budget={smallest} takes of the reserve" if budget.kind == "auto" else ""
        if spare > 0:
            how += f"; prefill_chunk={activations.SMALLEST_CHUNK} takes {format_bytes(spare)} less, prompts take longer"
        raise BudgetError(
            f"{name} does not run in {format_bytes(nbytes)}: the smallest budget that works is "
            f"{format_bytes(smallest)} ({smallest} bytes): {format_bytes(fixed - copies)} for weights outside experts, "
            f"staging, KV cache and activations, {_for_copies(copies)}and one slot of {format_bytes(slot_bytes)} in "
            f"each of {len(experts)} layers{_beside(libraries.of(smallest))}{how}",
            needed=smallest,
            budget=nbytes,
        )
    slots = divide_slots(total, experts)
    return slots, budget.nbytes or libraries.beside(fixed + sum(slots) * slot_bytes)


def _for_copies(nbytes: int) -> str:
    return f"{format_bytes(nbytes)} for copies of all experts (coarse=), " if nbytes else ""


def _beside(nbytes: int) -> str:
    return f", beside {format_bytes(nbytes)} for torch and Transformers" if nbytes else ""


def divide_slots(total: int, experts: tuple[int, ...]) -> tuple[int, ...]:
    """Divides slots evenly over layers, at most one per expert; what a small layer cannot use goes to the others.

    Args:
        total: slots to give away, at least one per layer.
        experts: routed experts of each layer.
    """
    slots = [0] * len(experts)
    left = total
    while left:
        open_layers = [i for i, count in enumerate(experts) if slots[i] < count]
        if not open_layers:
            break
        each = max(1, left // len(open_layers))
        for i in open_layers:
            give = min(each, experts[i] - slots[i], left)
            slots[i] += give
            left -= give
    return tuple(slots)


def _forecast(
    rates: bandwidth.Rates,
    non_expert: int,
    bytes_of: Sequence[int],
    slots: tuple[int, ...],
    experts: tuple[int, ...],
    top_k: int,
    *,
    copies: Sequence[int],
    masses: Collection[float],
) -> tuple[float, float]:
    """Tokens/s of decode with routing at random, and with routing that recurs as in the public traces.

    Args:
        bytes_of: an expert of each layer, as it is stored.
        copies: bytes of a copy of each, which stands in for one that is missing; none where all that miss are read.
        masses: `exact_mass` of each task. Where any is under 1, the first figure is that of reading all that miss, as
            no share of a pick is known; the second is that of the fewest reads: where the largest is no more than an
            even share, one pick of each row is full or is read.
    """

    def seconds(hit_rate: Any, read: float) -> float:
        layers = zip(slots, experts, bytes_of, copies or bytes_of, strict=True)
        missed = [(top_k * (1 - hit_rate(have / count)), whole, used) for have, count, whole, used in layers]
        computed = top_k * sum(bytes_of) + sum(count * (1 - read) * (used - whole) for count, whole, used in missed)
        return (non_expert + computed) / rates.memory + sum(n * read * whole for n, whole, _ in missed) / rates.disk

    least = most = 1.0
    if copies:
        least, most = float(max(masses) <= 1 / top_k) / top_k, float(min(masses) < 1)
    random, recurs = seconds(lambda share: share, most), seconds(recurrent_hit_rate, least)
    return 1 / max(random, recurs), 1 / min(random, recurs)  # a copy is sooner computed than a full expert


def recurrent_hit_rate(share: float) -> float:
    """Linear interpolation of RECURRENT_HIT_RATE."""
    for (x0, y0), (x1, y1) in pairwise(RECURRENT_HIT_RATE):
        if share <= x1:
            return y0 + (y1 - y0) * (share - x0) / (x1 - x0)
    return 1.0


def _round_up(value: int, unit: int) -> int:
    return -(-value // unit) * unit
