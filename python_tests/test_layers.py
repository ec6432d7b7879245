"""The layers keep their direction: includes in csrc and imports in emoe never turn back."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ALLOWED_INCLUDES = {
    "core": {"core"},
    "io": {"io", "core"},
    "cpu": {"cpu", "core"},
    "cuda": {"cuda", "core", "tests"},  # tests: port.cuh, in the emulated build
    "bindings": {"bindings", "io", "cpu", "cuda", "core"},
}
# Which rooms of emoe/ a room may import, by the name of its file or folder. Rows go from the ground up: a room imports
# only what stands above its own row, so there is no circle. `errors` is open to all.
ALLOWED_IMPORTS = {
    "errors": set(),
    "files": set(),
    "memory": set(),
    "native": set(),
    "requests": set(),
    "options": set(),
    "model": {"options", "files", "native"},
    "store": {"model", "files", "memory"},
    "trace": {"files"},
    "tasks": {"files"},
    "predictor": {"trace", "files"},
    "routing": {"model", "options", "requests"},
    "sensitivity": {"routing", "model", "requests", "files"},
    "slots": {"routing", "sensitivity", "predictor", "options", "requests", "native"},
    "planning": {"store", "model", "options", "memory", "files"},
    "seam": {"store", "model", "requests", "files", "memory"},
    "compute": {"slots", "store", "trace", "model", "options", "requests", "native", "memory"},
    "replay": {"slots", "predictor", "trace"},
    "runtime": {
        "compute", "planning", "slots", "seam", "routing", "store", "sensitivity", "trace", "requests", "native",
        "options",
    },
    "entry": {
        "runtime", "compute", "planning", "slots", "seam", "routing", "store", "model", "options",
    },
    "engine": {
        "runtime", "planning", "seam", "tasks", "predictor", "trace", "requests", "options", "memory", "files",
    },
    "__init__": {"engine", "entry", "runtime", "planning", "slots", "predictor", "sensitivity", "tasks", "trace"},
    "generate": {"model", "files"},
    "analysis": {
        "__init__", "runtime", "routing", "slots", "replay", "sensitivity", "predictor", "tasks", "trace", "memory",
    },
    "demo": {"__init__", "generate", "files", "memory"},
    "convert": {
        "__init__", "generate", "demo", "planning", "seam", "store", "model", "options", "memory", "files",
        "sensitivity", "tasks",
    },
    "serve": {"__init__", "engine", "generate"},
    "cli": {
        "__init__", "serve", "engine", "convert", "analysis", "demo", "generate", "planning", "seam", "replay",
        "sensitivity", "predictor", "tasks", "trace", "options", "model", "native", "memory", "files",
    },
    "__main__": {"cli"},
}  # fmt: skip
# What rooms that decide about ids do not load, through whatever they import.
WITHOUT = {
    "slots/policy.py": {"torch", "numpy"},
    "slots/cache.py": {"torch", "numpy"},
    "slots/loader.py": {"torch", "numpy"},
    "compute/misses.py": {"torch", "numpy"},
    "engine/scheduler.py": {"torch", "numpy"},
    "engine/costs.py": {"torch", "numpy"},
    "engine/placement.py": {"torch", "numpy"},
    "serve/routes.py": {"torch", "numpy", "ray"},
    "serve/setup.py": {"torch", "ray"},
    "trace/trace.py": {"torch"},
    "cli/__init__.py": {"torch", "transformers", "fastapi", "uvicorn", "emoe.serve"},
    "cli/serve.py": {"torch", "transformers", "fastapi", "uvicorn"},
    "__init__.py": {"torch", "numpy", "transformers"},
    "options.py": {"torch", "numpy", "transformers"},
}


@pytest.mark.parametrize("folder", sorted(ALLOWED_INCLUDES))
def test_includes_of_csrc_never_turn_back(folder):
    for source in (ROOT / "csrc" / folder).iterdir():
        for included in re.findall(r'#include "([a-z_]+)/', source.read_text()):
            assert included in ALLOWED_INCLUDES[folder], f"{source.name} includes {included}/"


def test_only_bindings_know_python_and_nothing_knows_torch():
    for source in (ROOT / "csrc").rglob("*.[chi]*"):
        text = source.read_text()
        assert "torch/" not in text, source
        if source.parent.name != "bindings":
            assert "pybind11" not in text, source


def _room(module: str) -> str:
    """ "emoe.slots.cache" -> "slots"; the package itself is "__init__"."""
    name = [*module.split("."), "__init__"][1]
    return name if name in ROOMS else "__init__"  # a name that the package hands on, such as emoe.__version__


ROOMS = {path.name.removesuffix(".py") for path in (ROOT / "emoe").iterdir() if path.suffix == ".py" or path.is_dir()}


def _imported(source: Path, *, at_run_time: bool = False) -> set[str]:
    """Modules that a file names in imports, wherever in it; `from emoe.x import y` gives emoe.x and emoe.x.y."""
    found: set[str] = set()
    for node in _nodes(ast.parse(source.read_text()), at_run_time):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level and node.module, f"{source}: line {node.lineno} imports by a relative name"
            found |= {node.module} if node.module != "emoe" else set()
            found |= {f"{node.module}.{alias.name}" for alias in node.names if node.module.startswith("emoe")}
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in ("import_module", "__import__"):
            found |= {each.value for each in node.args if isinstance(each, ast.Constant)}
    return found


def _nodes(tree: ast.AST, at_run_time: bool):
    for node in ast.iter_child_nodes(tree):
        if at_run_time and isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        if at_run_time and isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        yield node
        yield from _nodes(node, at_run_time)


def _sources(room: str) -> list[Path]:
    folder = ROOT / "emoe" / room
    return sorted(folder.rglob("*.py")) if folder.is_dir() else [folder.with_suffix(".py")]


def _rooms(sources: list[Path]) -> set[str]:
    """Rooms that files import."""
    modules = {module for source in sources for module in _imported(source) if module.split(".")[0] == "emoe"}
    return {_room(module) for module in modules - {"emoe._C", "emoe._C_emulated"}}


def test_every_room_has_a_row():
    assert {room for room in ROOMS if room not in ("__pycache__", "py.typed")} == set(ALLOWED_IMPORTS)


def test_rows_go_from_the_ground_up():
    seen: set[str] = set()
    for room, allowed in ALLOWED_IMPORTS.items():
        assert allowed <= seen, f"{room} may import {allowed - seen}, which stand below it"
        seen.add(room)


@pytest.mark.parametrize("room", sorted(ALLOWED_IMPORTS))
def test_a_room_imports_only_what_its_row_allows(room):
    for source in _sources(room):
        unlisted = _rooms([source]) - ALLOWED_IMPORTS[room] - {room, "errors"}
        assert not unlisted, f"{source.relative_to(ROOT)} imports {unlisted}"


def test_no_row_allows_what_nobody_imports():
    for room, allowed in ALLOWED_IMPORTS.items():
        assert allowed <= (found := _rooms(_sources(room))), f"{room}: nobody imports {allowed - found}"


def _loaded(source: Path, seen: set[Path]) -> set[str]:
    """What importing a file loads, through emoe's own modules as well."""
    found: set[str] = set()
    for module in _imported(source, at_run_time=True):
        found.add(module.split(".")[0])
        if module.split(".")[0] != "emoe":
            continue
        path = ROOT / Path(*module.split("."))
        for own in (path.with_suffix(".py"), *(each / "__init__.py" for each in (path, *path.parents))):
            if own.is_file() and ROOT / "emoe" in own.parents and own not in seen:
                seen.add(own)
                found |= _loaded(own, seen)
    return found


@pytest.mark.parametrize("source", sorted(WITHOUT))
def test_what_decides_about_ids_loads_no_arrays(source):
    assert not WITHOUT[source] & _loaded(ROOT / "emoe" / source, set())


def test_the_package_has_at_most_the_entries_and_runtime_the_imports_that_were_agreed():
    assert len(ALLOWED_IMPORTS) <= 29
    runtime = _rooms(_sources("runtime")) - {"runtime"}
    assert len(runtime) <= 13, runtime
