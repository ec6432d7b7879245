"""RMSNorms of a model by a function of emoe's: one operation in the place of seven of torch's.

A class of norms is known by what it computes (`is_plain`), not by its name. While emoe runs the model its norms are of
a class derived from their own, whose forward asks emoe first; parameters, hooks and names stay.
"""

from __future__ import annotations

import copyreg
import functools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from emoe.model.seen import operations_are_seen

# [..., width] of x, a weight [width] of its dtype, and an epsilon.
Norm = Callable[[torch.Tensor, torch.Tensor, float], torch.Tensor]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@functools.cache
def is_plain(kind: Any) -> bool:
    """Whether a class computes `weight * (x / sqrt(mean(x^2) + variance_epsilon))`, the mean in float32, what is in
    brackets rounded before the product, and looks at nothing but its weight and epsilon.
    """
    generator = torch.Generator().manual_seed(0)
    for dtype in _DTYPES:
        x, weight = (torch.randn(shape, generator=generator).to(dtype) for shape in ((3, 5, 48), (48,)))
        wide = x.float()
        scaled = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 0.3)
        try:
            found = kind.forward(SimpleNamespace(weight=weight, variance_epsilon=0.3), x)
        except Exception:  # whatever its code does with other attributes
            return False
        if not isinstance(found, torch.Tensor) or not torch.equal(found, weight * scaled.to(dtype)):
            return False
    return True


@functools.cache
def _class_of(kind: Any, norm: Norm) -> type[nn.Module]:
    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        return norm(x, self.weight, self.variance_epsilon) if _is_ours(x, self.weight) else kind.forward(self, x)

    def reduce(self: Any, protocol: Any) -> Any:
        """Copied and pickled as the norm that it stands for."""
        return copyreg._reconstructor, (kind, object, None), vars(self).copy()  # type: ignore[attr-defined]

    return type(kind.__name__, (kind,), {"forward": forward, "__reduce_ex__": reduce, "__module__": __name__})


def _is_ours(x: Any, weight: torch.Tensor) -> bool:
    if operations_are_seen() or type(x) is not torch.Tensor or type(weight) is not nn.Parameter:
        return False
    if x.dtype not in _DTYPES or weight.dtype != x.dtype or not (x.is_cpu and weight.is_cpu):
        return False
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        return False
    return x.dim() > 0 and x.shape[-1] == weight.shape[0] and x.numel() > 0 and weight.is_contiguous()


class Norms:
    """Has the plain RMSNorms of a model computed by `norm` until `remove`.

    Attributes:
        modules: the norms.
    """

    def __init__(self, model: nn.Module, norm: Norm) -> None:
        self.modules: list[Any] = []
        each: Any
        kind: Any  # a type, which mypy takes for a module: its hash is another function
        for each in model.modules():
            kind = type(each)
            weight = each._parameters.get("weight")
            known = isinstance(getattr(each, "variance_epsilon", None), float) and not each._buffers
            if known and weight is not None and weight.dim() == 1 and is_plain(kind):
                self.modules.append(each)
        for each in self.modules:
            kind = type(each)
            each.__class__ = _class_of(kind, norm)

    def remove(self) -> None:
        """The norms are of their own class again; calling it again does nothing."""
        for module in self.modules:
            if type(module).__module__ == __name__:
                module.__class__ = type(module).__bases__[0]
