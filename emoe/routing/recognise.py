"""Finds the router of each experts module and the rule it follows, by behaviour: the router is run on probes.

Names decide nothing but the order of trying. What is not recognised is an UnsupportedModelError, never a guess.
"""

from __future__ import annotations

import copy
import inspect
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

import torch
from torch import nn

from emoe.errors import UnsupportedModelError
from emoe.model.structure import find_experts
from emoe.routing.rules import SCORES, Groups, Rule, Vector

SPREADS = (0.5, 2.0, 6.0)  # standard deviations of the probes' logits
TOKENS = 128  # probes of each spread
TOLERANCE = 1e-4  # of weights, relative, in float32; of the picks' summed selection scores, absolute
_NAMES = ("gate", "router")  # tried first


@dataclass(frozen=True)
class Output:
    """What a router module returns: logits [T, E], weights [T, K], index [T, K] int64."""

    logits: torch.Tensor
    weights: torch.Tensor
    index: torch.Tensor


@dataclass(frozen=True)
class Site:
    """A router in a model.

    Attributes:
        layer: number of its experts module.
        path: the router's path in the model.
        module: the router; its output is (logits, weights, index).
        rule: how it selects, or None where experts follow from the token id alone (a table), which no mode changes.
    """

    layer: int
    path: str
    module: nn.Module
    rule: Rule | None


def find_routers(model: nn.Module) -> list[Site]:
    """The router of every experts module, in layer order, each with its rule verified on probes.

    Raises:
        UnsupportedModelError: a layer's router was not found or follows no rule emoe knows; names family and module.
    """
    sites: list[Site] = []
    for layer, (path, experts) in enumerate(find_experts(model)):
        known = [site.rule for site in sites if site.rule is not None][-1:]
        sites.append(_find_router(model, layer, path, experts, known))
    return sites


def _find_router(model: nn.Module, layer: int, path: str, experts: nn.Module, known: list[Rule]) -> Site:
    parent_path = path.rpartition(".")[0]
    parent = model.get_submodule(parent_path)
    count = cast(int, experts.num_experts)
    dtype = _dtype(model)
    reasons = []
    for name, module in _candidates(parent, experts, count):
        here = f"{parent_path}.{name}" if parent_path else name
        missing = _missing_arguments(module, parent)
        if missing and _is_table(module, missing):
            return Site(layer, here, module, None)
        try:
            if missing:
                raise _UnrecognisedError(f"{type(parent).__name__} does not keep its argument {', '.join(missing)}")
            return Site(layer, here, module, _recognise(module, parent, count, dtype, known))
        except _UnrecognisedError as error:
            reasons.append(f"{here} ({type(module).__name__}): {error}")
    family = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
    raise UnsupportedModelError(
        f"routing modes other than 'exact' do not work for family {family!r}: "
        + ("; ".join(reasons) or f"no router was found beside {path} in {type(parent).__name__}")
    )


class _UnrecognisedError(Exception):
    """Why a module is not a router whose rule is known."""


def _dtype(model: nn.Module) -> torch.dtype:
    """What hidden states come in: the dtype of the token embeddings."""
    find = getattr(model, "get_input_embeddings", None)
    embeddings = find() if callable(find) else None
    return next((embeddings if isinstance(embeddings, nn.Module) else model).parameters()).dtype


def _candidates(parent: nn.Module, experts: nn.Module, count: int) -> list[tuple[str, nn.Module]]:
    """Siblings of the experts module that hold a matrix with one row an expert, likely names first."""
    found = [
        (name, child)
        for name, child in parent.named_children()
        if child is not experts and _gate_weight(child, count) is not None
    ]
    return sorted(found, key=lambda item: item[0] not in _NAMES)


def _gate_weight(module: nn.Module, count: int) -> torch.Tensor | None:
    return next((p for p in module.parameters() if p.dim() == 2 and p.shape[0] == count), None)


def _extra_parameters(module: nn.Module) -> list[inspect.Parameter]:
    """Parameters of the forward after the hidden states that have to be given."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return [p for p in inspect.signature(type(module).forward).parameters.values() if p.kind in kinds][2:]


def _missing_arguments(module: nn.Module, parent: nn.Module) -> list[str]:
    return [
        p.name
        for p in _extra_parameters(module)
        if p.default is p.empty and not isinstance(getattr(parent, p.name, None), torch.Tensor)
    ]


def _is_table(module: nn.Module, missing: list[str]) -> bool:
    """Experts are looked up by token id: an integer table [vocabulary, K], and token ids among the arguments."""
    integers = (torch.int64, torch.int32, torch.int16)
    return "input_ids" in missing and any(b.dim() == 2 and b.dtype in integers for b in module.buffers())


def _recognise(module: nn.Module, parent: nn.Module, count: int, dtype: torch.dtype, known: list[Rule]) -> Rule:
    arguments = [
        value for p in _extra_parameters(module) if isinstance(value := getattr(parent, p.name, None), torch.Tensor)
    ]
    # Float32 tells rules apart that bfloat16 would blur; then the rule has to hold on the module as it is.
    exact = copy.deepcopy(module).float().eval()
    output = _probe(exact, [a.float() if a.is_floating_point() else a for a in arguments], count, torch.float32)
    vectors = _vectors(module, parent, count)
    rule = _first_fit(output, itertools.chain(_hints(known, vectors), _rules(output, module, vectors, count)), module)
    if rule is None:
        raise _UnrecognisedError("its picks and weights follow from its logits by no rule that emoe knows")
    training = module.training
    try:
        own = _probe(module.eval(), arguments, count, dtype)
    finally:
        module.train(training)
    dtypes = {dtype, *(p.dtype for p in module.parameters())}
    if not _holds(rule, own, max(TOLERANCE, *(8 * torch.finfo(each).eps for each in dtypes))):
        raise _UnrecognisedError(f"its rule in float32 ({rule}) is not the one it follows in {dtype}")
    return rule


def _vectors(module: nn.Module, parent: nn.Module, count: int) -> list[Vector]:
    """Tensors of one number per expert that the router keeps or is given, where they are not all zero."""
    owned = [
        (owner, name, tensor)
        for owner in module.modules()
        for name, tensor in (*owner.named_parameters(recurse=False), *owner.named_buffers(recurse=False))
    ]
    given = [(parent, p.name, getattr(parent, p.name, None)) for p in _extra_parameters(module)]
    return [
        Vector(owner, name)
        for owner, name, tensor in (*owned, *given)
        if isinstance(tensor, torch.Tensor) and tensor.is_floating_point() and tensor.numel() == count and tensor.any()
    ]


@torch.no_grad()
def _probe(module: nn.Module, arguments: list[torch.Tensor], count: int, dtype: torch.dtype) -> Output:
    """The router's output on random hidden states whose logits have the spreads of SPREADS, one after the other."""
    weight = _gate_weight(module, count)
    assert weight is not None
    width = _input_width(module, weight)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(TOKENS * len(SPREADS), width, generator=generator)
    hidden = hidden.to(device=weight.device, dtype=dtype)
    logits = _run(module, hidden, arguments).logits.float()
    deviation = (logits - logits.mean(-1, keepdim=True)).std().item()
    if not deviation > 0:
        raise _UnrecognisedError("its logits are the same for all experts whatever the token; are its weights loaded?")
    factors = torch.tensor(SPREADS).repeat_interleave(TOKENS).unsqueeze(1) / deviation
    return _run(module, hidden * factors.to(hidden), arguments)


def _input_width(module: nn.Module, weight: torch.Tensor) -> int:
    return next((m.in_features for m in module.modules() if isinstance(m, nn.Linear)), int(weight.shape[1]))


def _run(module: nn.Module, hidden: torch.Tensor, arguments: list[torch.Tensor]) -> Output:
    error: Exception | None = None
    for shaped in (hidden, hidden.unsqueeze(0)):  # some unpack a batch dimension
        try:
            # Not module(...): hooks of others must not see probes.
            output = type(module).forward(module, shaped.clone(), *arguments)
        except (RuntimeError, ValueError, TypeError) as raised:
            error = raised
            continue
        return _checked(output, len(hidden))
    raise _UnrecognisedError(f"it does not run on hidden states {tuple(hidden.shape)}: {error}")


def _checked(output: Any, tokens: int) -> Output:
    wanted = "logits [T, E], weights [T, K] and integer indices [T, K]"
    if not (isinstance(output, tuple) and len(output) == 3 and all(isinstance(o, torch.Tensor) for o in output)):
        raise _UnrecognisedError(f"it does not return {wanted}")
    logits, weights, index = output
    if not (
        logits.dim() == weights.dim() == index.dim() == 2
        and weights.shape == index.shape
        and len(logits) == len(index) == tokens
        and not index.is_floating_point()
    ):
        raise _UnrecognisedError(f"it returns {[tuple(o.shape) for o in output]} and not {wanted}")
    return Output(logits, weights, index.long())


def _numbers(module: nn.Module, kinds: tuple[type, ...]) -> list[Any]:
    """Plain numbers that the module keeps, each once."""
    values = (value for key, value in vars(module).items() if not key.startswith("_"))
    return list(dict.fromkeys(v for v in values if isinstance(v, kinds) and not isinstance(v, bool)))


def _group_choices(module: nn.Module, count: int) -> list[Groups | None]:
    """No groups, and the groupings that numbers kept by the module may mean."""
    numbers = _numbers(module, (int,))
    choices: list[Groups | None] = [None]
    for groups, keep in itertools.product(numbers, numbers):
        if 1 < groups < count and count % groups == 0 and 1 <= keep < groups:
            choices += [Groups(groups, keep, "top2"), Groups(groups, keep, "max")]
    return choices


def _hints(known: list[Rule], vectors: list[Vector]) -> Iterator[Rule]:
    """The rules of other layers with this layer's own tensors."""
    by_name = {vector.name: vector for vector in vectors}
    for rule in known:
        names = [vector.name for vector in (rule.correction, rule.expert_scale) if vector is not None]
        if all(name in by_name for name in names):
            yield replace(
                rule,
                correction=rule.correction and by_name[rule.correction.name],
                expert_scale=rule.expert_scale and by_name[rule.expert_scale.name],
            )


def _rules(output: Output, module: nn.Module, vectors: list[Vector], count: int) -> Iterator[Rule]:
    """Every rule worth trying, at scale 1; those that use a correction first, for without it they may fit by luck."""
    probabilities = bool((output.logits >= 0).all() and (output.logits.sum(-1) - 1).abs().max() < 1e-3)
    corrections: list[tuple[Vector | None, Literal["scores", "logits"]]] = []
    for vector in vectors:
        corrections += [(vector, "scores"), (vector, "logits")]
    for score, normalised in itertools.product(SCORES, (True, False)):
        base = Rule(score, normalised, probabilities=probabilities)
        for (correction, corrects), groups in itertools.product(
            [*corrections, (None, "scores")], _group_choices(module, count)
        ):
            yield replace(base, correction=correction, corrects=corrects, groups=groups)
        for vector in vectors:
            yield replace(base, expert_scale=vector)
    for jitter in _numbers(module, (float,)):
        yield Rule("softmax", False, jitter=jitter, probabilities=probabilities)


def _first_fit(output: Output, rules: Iterable[Rule], module: nn.Module) -> Rule | None:
    """The first rule that gives the module's own picks and weights, its scale filled in."""
    for rule in rules:
        logits = rule.logits(output.logits)
        if not _selects(rule, logits, output.index, TOLERANCE):
            continue
        expected = rule.weights(logits, output.index)
        clear = expected > 1e-3 * expected.amax(-1, keepdim=True)  # very small weights say little about the scale
        scale = rule.scale * (output.weights[clear] / expected[clear]).median().item()
        named = [float(number) for number in (1.0, *_numbers(module, (int, float)))]
        scale = next((number for number in named if abs(scale - number) <= TOLERANCE * abs(number)), scale)
        fitted = replace(rule, scale=scale)
        if scale > 0 and _weighs(fitted, logits, output, TOLERANCE):
            return fitted
    return None


def _holds(rule: Rule, output: Output, tolerance: float) -> bool:
    logits = rule.logits(output.logits)
    return _selects(rule, logits, output.index, tolerance) and _weighs(rule, logits, output, tolerance)


def _selects(rule: Rule, logits: torch.Tensor, index: torch.Tensor, tolerance: float) -> bool:
    choice = rule.choice(logits)
    allowed = rule.allowed(choice)
    if allowed is not None:
        choice = choice.masked_fill(~allowed, float("-inf"))
    # Saturated scores tie, and a tie may go either way: what has to agree is the score of the picks, not their names.
    best = choice.topk(index.shape[1], dim=-1).values
    own = choice.gather(1, index).sort(-1, descending=True).values
    return bool(((best - own).abs() <= tolerance * best.abs().clamp_min(1)).all())


def _weighs(rule: Rule, logits: torch.Tensor, output: Output, tolerance: float) -> bool:
    error = (output.weights.float() - rule.weights(logits, output.index)).abs().max()
    return bool(error <= tolerance * rule.scale)
