"""Prints the package's requirements and those of its extras, one a line, for pip."""

from pathlib import Path

import tomllib

project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["project"]
extras = project["optional-dependencies"]
every = {*project["dependencies"], *(each for extra in extras.values() for each in extra)}
print("\n".join(sorted(each for each in every if not each.startswith("emoe["))))  # an extra that has another one
