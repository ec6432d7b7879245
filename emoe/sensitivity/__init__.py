"""How much a task's answers change when its tokens go to other experts: profiled offline, or estimated while serving.

Knows models, routers and texts; nothing of budgets or residency policies. What a request is, it is told.
docs/tasks.md defines both.
"""

from emoe.sensitivity.online import Estimate, OnlineSensitivity
from emoe.sensitivity.probe import ANSWER_TOKENS, Probe, Prober, probe
from emoe.sensitivity.profile import SensitivityProfile, suggest_bias
from emoe.sensitivity.progressive import Sample, measure
from emoe.sensitivity.serving import RequestProbes

__all__ = [
    "ANSWER_TOKENS",
    "Estimate",
    "OnlineSensitivity",
    "Probe",
    "Prober",
    "RequestProbes",
    "Sample",
    "SensitivityProfile",
    "measure",
    "probe",
    "suggest_bias",
]
