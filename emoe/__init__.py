"""emoe runs Mixture-of-Experts language models inside a byte budget.

Importing this package loads neither torch nor the native module; the first use of a name below does.
"""

from __future__ import annotations

import os
import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

from emoe import errors

__version__ = "0.1.0"

# Torch's OpenMP threads spin for milliseconds after each loop, on CPUs that others need (docs/kernels.md, "Threads").
# This is read when torch is loaded; where it was loaded before, `emoe.native` does what is left to do.
if "torch" not in sys.modules and not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys():
    os.environ.update(OMP_WAIT_POLICY="passive", GOMP_SPINCOUNT="5000")  # libgomp: some 100 us; others: none

if TYPE_CHECKING:
    from emoe.engine.engine import Engine
    from emoe.engine.sampling import Sampling
    from emoe.engine.scheduler import Scheduler
    from emoe.entry import from_pretrained, wrap
    from emoe.planning.plan import Plan, plan
    from emoe.predictor import ExpertPredictor
    from emoe.runtime import Runtime
    from emoe.sensitivity import OnlineSensitivity, SensitivityProfile
    from emoe.slots.cache import CacheManager
    from emoe.tasks import TaskClassifier
    from emoe.trace.trace import TraceRecorder, load_trace

_LAZY = {
    "CacheManager": "emoe.slots.cache",
    "Engine": "emoe.engine.engine",
    "ExpertPredictor": "emoe.predictor",
    "OnlineSensitivity": "emoe.sensitivity",
    "Plan": "emoe.planning.plan",
    "Runtime": "emoe.runtime",
    "Sampling": "emoe.engine.sampling",
    "Scheduler": "emoe.engine.scheduler",
    "SensitivityProfile": "emoe.sensitivity",
    "TaskClassifier": "emoe.tasks",
    "TraceRecorder": "emoe.trace.trace",
    "from_pretrained": "emoe.entry",
    "load_trace": "emoe.trace.trace",
    "plan": "emoe.planning.plan",
    "wrap": "emoe.entry",
}

__all__ = [
    "CacheManager",
    "Engine",
    "ExpertPredictor",
    "OnlineSensitivity",
    "Plan",
    "Runtime",
    "Sampling",
    "Scheduler",
    "SensitivityProfile",
    "TaskClassifier",
    "TraceRecorder",
    "__version__",
    "errors",
    "from_pretrained",
    "load_trace",
    "plan",
    "wrap",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'emoe' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
