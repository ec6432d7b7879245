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
# What each decision module must not import, directly or not.
FORBIDDEN_IMPORTS = {
    "policy": {"torch", "numpy", "emoe.cache", "emoe.loader", "emoe.runtime"},
    "cache": {"torch", "numpy", "emoe.loader", "emoe.runtime", "emoe.experts"},
    "loader": {"torch", "emoe.runtime", "emoe.experts", "emoe.modeling"},
    "store": {"emoe.runtime", "emoe.experts", "emoe.loader", "emoe.cache"},
    "runtime": {"emoe.entry", "emoe.cli", "emoe.demo"},
    "records": {"emoe.runtime", "emoe.loader", "emoe.cache"},
    "experts": {"emoe.runtime", "emoe.planning"},
    "misses": {"torch", "numpy", "emoe.device", "emoe.loader", "emoe.runtime"},
    "device_experts": {"emoe.runtime", "emoe.experts", "emoe.planning"},
    "slot_tables": {"emoe.runtime", "emoe.experts", "emoe.routing", "emoe.device"},
    "modeling": {"emoe.runtime", "emoe.experts", "emoe.planning"},
    "tasks": {"emoe.runtime", "emoe.loader", "emoe.routing", "emoe.predictor", "emoe.cache"},
    "sensitivity": {"emoe.runtime", "emoe.loader", "emoe.tasks", "emoe.predictor", "emoe.experts"},
    "timeline": {"emoe.analysis", "emoe.cli"},
    "analysis": {"emoe.cli", "emoe.demo"},
    "routing": {"emoe.runtime", "emoe.loader", "emoe.experts", "emoe.residency", "emoe.predictor"},
    "residency": {"emoe.runtime", "emoe.experts", "emoe.planning", "emoe.replay", "emoe.cli"},
    "request_start": {"emoe"},
    "next_layer": {"emoe.runtime", "emoe.experts", "emoe.residency"},
    "prediction": {"emoe.runtime", "emoe.experts", "emoe.residency"},
    "trace": {"torch", "emoe.predictor", "emoe.replay", "emoe.runtime"},
    "predictor": {"emoe.replay", "emoe.residency", "emoe.loader", "emoe.runtime", "emoe.cli"},
    "replay": {"emoe.analysis", "emoe.residency", "emoe.loader", "emoe.runtime", "emoe.cli"},
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


def _imports(name: str, seen: set[str]) -> set[str]:
    """Modules that `emoe.<name>` imports at run time, through emoe's own modules as well."""
    folder = ROOT / "emoe" / name
    files = sorted(folder.glob("*.py")) if folder.is_dir() else [ROOT / "emoe" / f"{name}.py"]
    found: set[str] = set()
    for file in files:
        if not file.exists():  # the native module
            continue
        for node in _runtime_nodes(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                found.add(node.module)
                if node.module == "emoe":
                    found |= {f"emoe.{alias.name}" for alias in node.names}
    for module in list(found):
        own = module.removeprefix("emoe.").split(".")[0]
        if module.startswith("emoe.") and own not in seen:
            seen.add(own)  # shared, so that no module is read twice
            found |= _imports(own, seen)
    return found


def _runtime_nodes(tree: ast.AST):
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        yield node
        yield from _runtime_nodes(node)


@pytest.mark.parametrize("name", sorted(FORBIDDEN_IMPORTS))
def test_imports_of_emoe_never_turn_back(name):
    found = _imports(name, {name})
    roots = set(found) | {module.split(".")[0] for module in found}
    assert not FORBIDDEN_IMPORTS[name] & roots
