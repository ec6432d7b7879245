"""Files: those that users give, read within bounds, and those that emoe writes, whole or not at all.

One reader for each container: `jsontext`, `npz`, `table` (.csv) and `arrays` (safetensors with settings). Each looks at
the file's size before it takes memory, and raises nothing but `emoe.errors`. What is in a file is for callers to say.
"""

from emoe.files.arrays import read, texts, write
from emoe.files.content import content, lines, opened
from emoe.files.folder import cache_folder
from emoe.files.owned import OwnFolder, OwnNames, nameless, sweep, whole

__all__ = [
    "OwnFolder",
    "OwnNames",
    "cache_folder",
    "content",
    "lines",
    "nameless",
    "opened",
    "read",
    "sweep",
    "texts",
    "whole",
    "write",
]
