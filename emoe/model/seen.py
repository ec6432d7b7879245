"""Whether torch's operations are seen by somebody, who would miss what is computed beside torch."""

from __future__ import annotations

import torch


def operations_are_seen() -> bool:
    """Whether a compiler, a trace, a mode, a transform or forward-mode gradients are to see which operations run."""
    return bool(
        torch.compiler.is_compiling()
        or torch._C._get_tracing_state() is not None
        or torch._C._len_torch_dispatch_stack()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch.autograd.forward_ad._current_level >= 0
    )
