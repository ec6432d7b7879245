"""Which task a prompt belongs to, from its words or from the model's input embeddings; "unknown" is an answer too.

Knows texts and numbers; nothing of experts, residency or requests. docs/tasks.md explains both classifiers.
"""

from emoe.tasks.classifier import KINDS, Classification, TaskClassifier, make
from emoe.tasks.confusion import ConfusionMatrix
from emoe.tasks.embeddings import EmbeddingClassifier
from emoe.tasks.keywords import KeywordClassifier
from emoe.tasks.prompts import Prompt, load_prompts

__all__ = [
    "KINDS",
    "Classification",
    "ConfusionMatrix",
    "EmbeddingClassifier",
    "KeywordClassifier",
    "Prompt",
    "TaskClassifier",
    "load_prompts",
    "make",
]
