"""From what a server was told to a model with an engine: in the server's own process, or in each replica."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What a server runs; can be pickled.

    Attributes:
        model: a folder, or a name that Transformers finds.
        options: of `emoe.from_pretrained`.
        trust_remote_code: the model's own code may run.
        scheduler, kv_budget, most_running: as `emoe.Engine`.
        queue: requests that wait at most.
        tasks: file of a task classifier; None: none.
    """

    model: str
    options: Mapping[str, Any]
    trust_remote_code: bool = False
    scheduler: str | None = None
    kv_budget: int | str = "auto"
    most_running: int | None = None
    queue: int
    tasks: str | None = None

    @property
    def name(self) -> str:
        """For clients, unless they are told another."""
        folder = Path(self.model)
        return folder.resolve().name if folder.exists() else self.model

    def tokenizer(self) -> Any:
        from emoe import generate

        generate.quiet_transformers()
        return generate.load_tokenizer(self.model, trust_remote_code=self.trust_remote_code)

    def loaded(self) -> Any:
        """The model, under emoe."""
        import emoe

        return emoe.from_pretrained(self.model, **self.options, trust_remote_code=self.trust_remote_code)

    def engine(self, model: Any, tokenizer: Any) -> Any:
        import emoe

        engine = emoe.Engine(
            model, tokenizer, scheduler=self.scheduler, kv_budget=self.kv_budget, most_running=self.most_running
        )
        engine.scheduler.queue_limit = self.queue
        return engine

    def classifier(self, model: Any, tokenizer: Any) -> Any:
        """None where there is none."""
        import emoe

        return None if self.tasks is None else emoe.TaskClassifier.load(self.tasks, model, tokenizer)
