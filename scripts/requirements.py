"""Prints the package's requirements and those of its extras, one a line, for pip."""

from pathlib import Path

import tomllib

project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["project"]
extras = project["optional-dependencies"]
print("\n".join(sorted({*project["dependencies"], *(each for extra in extras.values() for each in extra)})))
