"""`emoe/_C.pyi` names what the native module has: every class, method, property and parameter, and no other."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import emoe
from emoe import native
from emoe.errors import BackendUnavailable

STUB = ast.parse((Path(emoe.__file__).parent / "_C.pyi").read_text(encoding="utf-8"))
OF_CUDA = {"cuda_refusal", "CudaDevice", "PinnedCache", "DeviceQueue"}  # not in a build without it


@pytest.fixture(params=["built", "emulated"])
def module(request):
    if request.param == "built":
        return native.load()
    try:
        return native.load_emulated()
    except BackendUnavailable as error:
        pytest.skip(str(error))


def _parameters(function):
    """(name, has a default, by keyword only) of each, from the stub."""
    positional = [each.arg for each in function.args.args]
    without = len(positional) - len(function.args.defaults)
    found = [(name, i >= without, False) for i, name in enumerate(positional)]
    keyword = zip(function.args.kwonlyargs, function.args.kw_defaults, strict=True)
    return found + [(each.arg, default is not None, True) for each, default in keyword]


def _documented(text):
    """The same, from the first line that pybind11 writes."""
    inside = re.match(r"\w+\((.*)\) -> ", text.strip().splitlines()[0]).group(1)
    parts, depth, start = [], 0, 0
    for i, letter in enumerate(f"{inside},"):
        depth += (letter in "[(") - (letter in "])")
        if letter == "," and not depth:
            parts.append(inside[start:i].strip())
            start = i + 1
    found, keyword_only = [], False
    for part in filter(None, parts):
        if part == "*":
            keyword_only = True
            continue
        name = re.match(r"\w+", part).group()
        found.append((name, " = " in part, keyword_only))
    return found


def _stub_class(node):
    methods = {each.name: each for each in node.body if isinstance(each, ast.FunctionDef)}
    properties = {
        name for name, each in methods.items() if any(getattr(d, "id", "") == "property" for d in each.decorator_list)
    }
    return {name: each for name, each in methods.items() if name not in properties}, properties


def test_the_stub_has_the_names_of_the_module(module):
    named = {node.name for node in STUB.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    absent = set() if module.cuda_status()["built"] else OF_CUDA
    assert {name for name in dir(module) if not name.startswith("__")} == named - absent


def test_functions_have_the_parameters_of_the_stub(module):
    for node in STUB.body:
        if isinstance(node, ast.FunctionDef) and hasattr(module, node.name):
            assert _documented(getattr(module, node.name).__doc__) == _parameters(node), node.name


def test_classes_have_the_methods_properties_and_parameters_of_the_stub(module):
    for node in STUB.body:
        if not isinstance(node, ast.ClassDef) or not hasattr(module, node.name):
            continue
        methods, properties = _stub_class(node)
        members = vars(getattr(module, node.name))
        public = {name for name in members if not name.startswith("_")}
        assert {name for name in public if isinstance(members[name], property)} == properties, node.name
        assert public - properties == set(methods) - {"__init__"}, node.name
        for name, method in methods.items():
            member = getattr(getattr(module, node.name), name)
            assert _documented(member.__doc__) == _parameters(method), f"{node.name}.{name}"
