"""What a prefill takes besides weights and KV cache, and how many tokens of it run at once.

The model's structure runs on the meta device over one chunk at the end of a full context, and bytes of the tensors that
are alive are counted. Attention and experts are stand-ins that ask for what torch's and emoe's take on a CPU.
"""

from __future__ import annotations

import copy
import inspect
import logging
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from threading import RLock
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from emoe.errors import ConfigError
from emoe.planning.kv_cache import decoders

logger = logging.getLogger(__name__)

# "auto" takes the longest chunk whose activations pass those of the smallest chunk (what grows with the context: copies
# of keys and values) by no more than this share of the model's weights, or this many bytes: a function of the model,
# not of the budget, so that chunks and with them results are the same in every budget. Each chunk reads most experts
# that have no slot again, so longer chunks are faster.
ALLOWANCE_SHARE = 1 / 32
ALLOWANCE_BYTES = 64 << 20
SMALLEST_CHUNK = 32

# Of emoe.compute.experts: fp32 outputs of pairs up to this many bytes, of rows beyond it.
_PAIR_BYTES = 32 << 20
_SIZES_ONLY = "emoe_sizes_only"  # attention and experts that only allocate
_LOGITS_COPIES = 3  # fp32 copies of the last row's logits that `generate` makes
_SEED = 8  # tokens that fill a cache, whose keys and values are then made longer
# Tokens at which a structure that may loop over tokens is run for more: one that goes on from its cache grows evenly
# once experts pass _PAIR_BYTES, a whole prompt with its square.
_LOOPED, _LOOPED_WHOLE = 512, 64

# Families with a recurrent or convolution state whose forward goes on from it with several tokens at once. The forward
# of others begins anew, and the result is silently another (python_tests/planning/test_prefill.py runs them all).
GOES_ON = ("qwen3_next", "qwen3_5_moe_text", "lfm2_moe", "nemotron_h", "inkling2_text")


@dataclass(frozen=True)
class Prefill:
    """How a prompt is computed.

    Attributes:
        chunk: tokens of one sequence that run at once; None: all of them.
        nbytes: activations of one chunk at the end of a full context.
        spare: how much less chunks of SMALLEST_CHUNK would take, where "auto" chose longer ones.
        notes: what is estimated or left whole.
    """

    chunk: int | None
    nbytes: int
    notes: tuple[str, ...] = ()
    spare: int = 0


def whole_because(model: Any) -> str:
    """Why a prompt of this model cannot be computed in parts, "" where it can."""
    name = type(model).__name__
    config = model.config.get_text_config(decoder=True)
    if model.config.is_encoder_decoder or not model.can_generate():
        return f"{name} is no decoder that generates"
    try:
        cache = DynamicCache(config=config)
    except Exception as error:
        return f"{name} has no cache that is known: {error}"
    family = getattr(config, "model_type", "")
    if getattr(model, "_is_stateful", False) and family not in GOES_ON:
        return f"{name} is not known to go on from a cache with several tokens"
    for layer in cache.layers:
        if type(layer) in (DynamicLayer, DynamicSlidingWindowLayer):
            continue
        if family not in GOES_ON:
            return f"{name} is not known to go on from a {type(layer).__name__} with several tokens"
    return ""


def plan_prefill(
    model: Any, chunk: int | str | None, *, context: int, batch: int, model_bytes: int, native: bool
) -> Prefill:
    """The chunk of a model and what it takes.

    Args:
        chunk: tokens, "auto", or None: the whole prompt at once.
        context, batch: tokens of a sequence, and sequences.
        model_bytes: weights of the whole model.
        native: whether emoe's kernels compute the experts.

    Raises:
        ConfigError: a number of tokens for a model whose prompts cannot be computed in parts.
    """
    reason = whole_because(model)
    if reason and isinstance(chunk, int) and chunk < context:
        raise ConfigError(f"prefill_chunk={chunk}: {reason}; prefill_chunk=None computes prompts whole")
    sizes = _Sizes(model, context, batch, native)
    if reason or chunk is None:
        taken = sizes(context)
        notes = (*sizes.notes, *([f"prompts are computed whole: {reason}"] if reason and model.can_generate() else []))
        return Prefill(None, taken, notes)
    if isinstance(chunk, int):
        taken = sizes(min(chunk, context))
        return Prefill(chunk, taken, sizes.notes)
    allowance = max(ALLOWANCE_BYTES, int(ALLOWANCE_SHARE * model_bytes))
    tokens, taken = context, sizes(context)
    least = sizes(SMALLEST_CHUNK) if context > SMALLEST_CHUNK else taken
    while taken - least > allowance:
        tokens = 1 << (tokens - 1).bit_length() - 1
        taken = sizes(tokens)
    return Prefill(tokens, taken, sizes.notes, taken - least)


class _Sizes:
    """Bytes of activations of `tokens` of each sequence at the end of the context."""

    def __init__(self, model: Any, context: int, batch: int, native: bool) -> None:
        self._model, self._context, self._batch, self._native = model, context, batch, native
        self._parts = decoders(model)  # the text decoder where the whole does not run on text alone
        self._structure: Any = None
        self.notes: tuple[str, ...] = ()
        config = model.config.get_text_config(decoder=True)
        self._generating = _LOGITS_COPIES * 4 * batch * (getattr(config, "vocab_size", 0) or 0)

    def __call__(self, tokens: int) -> int:
        while self._parts:
            try:
                return self._generating + self._measured(tokens)
            except Exception as error:
                logger.debug("activations of %s not measured: %s", type(self._parts[0]).__name__, error)
                self._parts, self._structure = self._parts[1:], None
        self.notes = ("activations estimated from the config",)
        return self._generating + _from_config(self._model, self._context, self._batch, tokens)

    def _measured(self, tokens: int) -> int:
        if self._structure is None:
            self._structure = _structure(self._parts[0])
        whole = bool(whole_because(self._model))
        step = _LOOPED_WHOLE if whole else _LOOPED
        if not getattr(self._model, "_is_stateful", False) or tokens <= 3 * step:
            return self._run(tokens, self._context - tokens)
        a, b, c = (self._run(count, 0 if whole else self._context - count) for count in (step, 2 * step, 3 * step))
        more = -(-tokens // step) - 3
        square = max(0, c - 2 * b + a) if whole else 0
        return c + max(0, c - b) * more + square * more * (more + 1) // 2

    def _run(self, tokens: int, past: int) -> int:
        model, batch = self._structure, self._batch
        takes_last = "logits_to_keep" in inspect.signature(type(model).forward).parameters
        last = {"logits_to_keep": 1} if takes_last else {}
        alive = _Alive()
        with torch.device("meta"), torch.no_grad(), _stand_ins(self._native):
            cache = None
            if past:
                seen = torch.zeros((batch, min(past, _SEED)), dtype=torch.long)
                cache = model(input_ids=seen, use_cache=True, **last).past_key_values
                _lengthen(cache, past)
                alive.leave_out(cache)
            with alive:
                model(
                    input_ids=torch.zeros((batch, tokens), dtype=torch.long), past_key_values=cache, use_cache=True,
                    **last,
                )  # fmt: skip
        return alive.peak


def _lengthen(cache: Any, tokens: int) -> None:
    """Makes of a cache one that has seen `tokens` tokens; states that do not grow stay."""
    for layer in cache.layers:
        if not isinstance(layer, DynamicLayer) or not layer.is_initialized:
            continue
        kept = tokens
        if isinstance(layer, DynamicSlidingWindowLayer):
            layer.cumulative_length, kept = tokens, min(tokens, layer.sliding_window - 1)
        for name in ("keys", "values"):
            old = getattr(layer, name)
            setattr(layer, name, old.new_empty((*old.shape[:-2], kept, old.shape[-1])))


class _Alive(TorchDispatchMode):
    """Bytes of storages made in the block that are alive, and their peak."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: set[int] = set()
        self.paused = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, torch.Tensor) and not self.paused:
                self._add(tensor.untyped_storage(), any(tensor is each for each in args), tensor, args)
        return result

    def _add(self, storage: Any, given: bool, tensor: torch.Tensor, args: Any) -> None:
        key = storage._cdata
        if given or key in self._known or _shares(storage, args):
            return
        self._known.add(key)
        size = storage.nbytes()
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._drop, key, size)

    def _drop(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size

    def leave_out(self, cache: Any) -> None:
        """Keys and values that grow are the KV cache's bytes, and are written where there is room (seam/kv_room.py)."""
        alive = self

        class Layer(DynamicLayer):
            _layer_type = None

            def update(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
                alive.paused = True
                try:
                    return super().update(*args, **kwargs)
                finally:
                    alive.paused = False

        for number, layer in enumerate(getattr(cache, "layers", [])):
            if type(layer) is DynamicLayer:
                cache.layers[number] = Layer()
                vars(cache.layers[number]).update(vars(layer))


def _shares(storage: Any, args: Any) -> bool:
    for each in args:
        if isinstance(each, torch.Tensor) and each.untyped_storage()._cdata == storage._cdata:
            return True
        if isinstance(each, (tuple, list)) and _shares(storage, each):
            return True
    return False


def _structure(model: Any) -> Any:
    attention = "eager" if getattr(model.config, "_attn_implementation", "eager") == "eager" else _SIZES_ONLY
    _register()
    with torch.device("meta"):
        made = (
            type(model)._from_config(copy.deepcopy(model.config), dtype=model.dtype, attn_implementation="eager").eval()
        )
        made.set_experts_implementation(dict.fromkeys(made.get_experts_implementation(), _SIZES_ONLY))
    if attention != "eager":
        made.set_attn_implementation(attention)
    return made


_native = True  # whether emoe's kernels compute the experts of the structure that runs; one at a time
_running = RLock()


@contextmanager
def _stand_ins(native: bool) -> Iterator[None]:
    global _native
    with _running:
        _native = native
        yield


def _register() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.moe import ExpertsInterface

    ExpertsInterface.register(_SIZES_ONLY, _experts)
    AttentionInterface.register(_SIZES_ONLY, _attention)
    AttentionMaskInterface.register(_SIZES_ONLY, _mask)


def _experts(self: nn.Module, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    T, K = index.shape
    H = hidden.shape[-1]
    pairs = T * K * H * 4
    out = torch.empty((pairs if pairs <= _PAIR_BYTES else T * H * 4,), dtype=torch.uint8, device="meta")
    if not _native:  # Transformers' own loop, all rows with one expert
        width = max(each.shape[1] + each.shape[2] for each in self.parameters() if each.dim() == 3)
        out = torch.empty((T, 2 * width), dtype=hidden.dtype, device="meta")
    result = torch.empty_like(hidden)
    del out
    return result


def _mask(batch_size: int, q_length: int, kv_length: int, *args: Any, **kwargs: Any) -> torch.Tensor | None:
    """[B, 1, Q, KV] where torch needs one: in a batch, which may have padding, and after earlier tokens."""
    if batch_size == 1 and q_length == kv_length and kwargs.get("local_size") is None:
        return None
    parts = [torch.empty((batch_size, 1, q_length, kv_length), dtype=torch.bool, device="meta") for _ in range(3)]
    return parts[0]


def _attention(
    module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any, **kwargs: Any
) -> tuple[torch.Tensor, None]:
    """What `sdpa` takes on a CPU: repeated heads, a mask of numbers, and scores where it has no fused kernel."""
    B, H, Q, D = query.shape
    held = []
    if key.shape[1] != H and mask is not None:
        held += [torch.empty((B, H, *each.shape[2:]), dtype=each.dtype, device="meta") for each in (key, value)]
    if mask is not None:
        held.append(torch.empty(mask.shape, dtype=query.dtype, device="meta"))
    if value.shape[-1] != D:
        held += [torch.empty((B, H, Q, key.shape[2]), dtype=torch.float32, device="meta") for _ in range(2)]
        held += [torch.empty((B, H, *each.shape[2:]), dtype=torch.float32, device="meta") for each in (key, value)]
    if query.dtype != torch.float32 and Q > 1:  # keys and values in the layout of its 16-bit products
        held += [torch.empty((B, H, *each.shape[2:]), dtype=each.dtype, device="meta") for each in (key, value)]
    out = torch.empty((B, H, Q, value.shape[-1]), dtype=query.dtype, device="meta")
    del held
    return out.transpose(1, 2).contiguous(), None


def _from_config(model: Any, context: int, batch: int, tokens: int) -> int:
    config = model.config.get_text_config(decoder=True)
    hidden = config.hidden_size
    heads = getattr(config, "num_attention_heads", 1)
    width = heads * (getattr(config, "head_dim", None) or hidden // heads)
    inner = max(getattr(config, "intermediate_size", 0) or 0, hidden)
    row = 8 * hidden + 8 * width + 3 * inner + 4 * hidden
    size = model.dtype.itemsize
    return int(batch * (tokens * row * size + tokens * context * (3 + size) + 2 * context * width * size))
