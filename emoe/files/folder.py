"""Where emoe keeps what it made for the next run."""

from __future__ import annotations

import os
from pathlib import Path

from emoe.errors import ConfigError


def cache_folder() -> Path:
    """The folder for measurements and built models: EMOE_CACHE, else `emoe` in XDG_CACHE_HOME or ~/.cache.

    It is created where it is missing.

    Raises:
        ConfigError: the folder cannot be created; names it and the variable that moves it.
    """
    own = os.environ.get("EMOE_CACHE")
    folder = (
        Path(own).expanduser() if own else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "emoe"
    )
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"cache folder {folder} cannot be created ({error}); EMOE_CACHE names another") from error
    return folder
