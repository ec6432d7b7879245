"""What was measured on this machine: JSON files in the user's cache folder, an entry with its time for each key."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from emoe import files
from emoe.errors import CheckpointError, ConfigError, EmoeError, MissingFileError
from emoe.files import cache_folder, jsontext

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Kept:
    """One such file. What is wrong with it, or with the folder, is a line in the log: it is measured anew.

    Attributes:
        name: of the file.
        what: it holds, in words, as "rates of memory and disk".
        check: raises ValueError or an `emoe.errors` class where an entry is not sound.
        seconds: that an entry is good for.
        most: entries that are kept, the latest.
    """

    name: str
    what: str
    check: Callable[[dict[str, Any]], object]
    seconds: float
    most: int = 64

    def get(self, key: str) -> dict[str, Any] | None:
        """What was kept under a key; None where nothing was, or it is too old."""
        try:
            entry = self.read(cache_folder() / self.name).get(key)
        except ConfigError:
            return None  # `put` says so
        return entry if entry is not None and 0 <= time.time() - entry["time"] < self.seconds else None

    def put(self, key: str, entry: dict[str, Any]) -> None:
        """Keeps an entry, with the time of now."""
        try:
            path = cache_folder() / self.name
        except ConfigError as error:
            logger.warning("emoe: %s are not kept: %s", self.what, error)
            return
        known = self.read(path, said=True)
        known.pop(key, None)
        while len(known) >= self.most:
            known.pop(min(known, key=lambda name: known[name]["time"]))
        known[key] = {**entry, "time": time.time()}
        try:
            with files.whole(path) as file:
                file.write(json.dumps(known).encode())
        except OSError as error:
            logger.warning("emoe: %s are not kept: %s", self.what, error)

    def read(self, path: Path, *, said: bool = False) -> dict[str, dict[str, Any]]:
        """All entries by key; none where the file is not there, or not sound, which the log says (unless `said`)."""
        try:
            known = jsontext.read(path, f"file of {self.what}", CheckpointError)
            if not isinstance(known, dict):
                raise ValueError(f"it is {type(known).__name__}, expected an object")
            for entry in known.values():
                if not isinstance(entry, dict):
                    raise ValueError(f"an entry is {jsontext.shown(entry)}")
                jsontext.number(entry.get("time"), "time", 0, 1e18)
                self.check(entry)
        except MissingFileError:
            return {}
        except (EmoeError, ValueError) as error:
            if not said:
                logger.warning("emoe: %s is damaged, %s are measured anew: %s", path, self.what, error)
            return {}
        return known
