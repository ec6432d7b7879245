"""What a model says of itself: its structure, its parameters, their layout in a slot."""

import re
from importlib.metadata import version

OLDEST_TRANSFORMERS = (5, 20)  # whose experts interface has what the seam asks of it; pyproject.toml


def require_transformers() -> None:
    """ImportError where this Transformers is too old: an installation without dependencies does not look."""
    found = version("transformers")
    if tuple(int(part) for part in re.findall(r"\d+", found)[:2]) < OLDEST_TRANSFORMERS:
        needed = ".".join(map(str, OLDEST_TRANSFORMERS))
        raise ImportError(
            f"emoe needs transformers {needed} or later, this is {found}: pip install 'transformers>={needed}'"
        )


require_transformers()
