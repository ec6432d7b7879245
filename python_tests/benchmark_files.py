"""Benchmarks as modules, for tests of their arithmetic."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


def benchmark(name: str) -> ModuleType:
    """`benchmarks/NAME.py`; what it imports by a name that tests have too is the benchmarks' own."""
    names = {path.stem for path in BENCHMARKS.glob("*.py")}
    aside = {each: sys.modules.pop(each) for each in names & set(sys.modules)}
    sys.path.insert(0, str(BENCHMARKS))
    try:
        spec = importlib.util.spec_from_file_location(f"{name}_benchmark", BENCHMARKS / f"{name}.py")
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module  # dataclasses look there
        spec.loader.exec_module(module)
        return module
    finally:
        sys.path.remove(str(BENCHMARKS))
        for each in names & set(sys.modules):
            del sys.modules[each]
        sys.modules.update(aside)
