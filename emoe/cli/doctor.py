"""`emoe doctor`: what was built, what this machine offers, and what is missing."""

from __future__ import annotations

import argparse
import os
import platform
import shutil
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from emoe import __version__
from emoe.cli import common
from emoe.errors import EmoeError, one_line

if TYPE_CHECKING:
    from emoe.model.encoding import Encoding

_EPILOG = """\
examples:
  emoe doctor
  emoe doctor --json | jq .native.isa
  EMOE_FORCE_ISA=avx2 emoe doctor

Ends with status 1 when something that emoe needs is missing; the last lines say what to do. EMOE_FORCE_ISA picks the
instruction set of the kernels (scalar, avx2, avx512; one that this machine lacks is an error), EMOE_CACHE the cache
folder.
"""

_CGROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
_UNLIMITED = 1 << 60  # the first version of cgroups writes a huge number where there is no limit


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = _EPILOG


def run(args: argparse.Namespace) -> int:
    with common.stage("looking around"):
        found = examine()
    if args.json:
        common.print_json(found)
    else:
        _print(found)
    return 1 if found["missing"] else 0


def examine() -> dict[str, Any]:
    """Everything the command shows; `missing` lists what has to be mended, as sentences."""
    missing: list[str] = []
    return {
        "versions": _versions(missing),
        "native": _native(missing),
        "transformers": _transformers(missing),
        "memory": _memory(),
        "cache": _cache(missing),
        "missing": missing,
    }


def _versions(missing: list[str]) -> dict[str, str | None]:
    versions: dict[str, str | None] = {"emoe": __version__, "python": platform.python_version()}
    for name in ("torch", "transformers", "safetensors"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = None
            missing.append(f"{name} is not installed: pip install {name}")
    return versions


def _native(missing: list[str]) -> dict[str, Any]:
    forced = os.environ.get("EMOE_FORCE_ISA") or None
    info: dict[str, Any] = {"built": False, "forced_isa": forced}
    try:
        from emoe import native

        info.update(native.describe())
    except Exception as error:  # a forced instruction set that is not there, or torch itself does not load
        info["error"] = one_line(error)
    if "error" in info:
        missing.append(info["error"])
    info["encodings"] = _encodings() if info["built"] else {}
    readers = info.get("readers", {})
    if readers and all(state.startswith("unavailable") for state in readers.values()):
        missing.append(f"no reader works: {readers}")
    return info


# One of each kind among those with parameters.
_SOME = (
    "e4m3-128x128-float32", "e4m3-row-bfloat16", "e4m3-tensor-float32", "e4m3-1x32-e8m0", "int8-row-bfloat16",
    "uint8b128-1x32-bfloat16",
    "int4-32-bfloat16", "int4-32-bfloat16-zeros", "awq-128-float16", "gptq-128-float16", "gptq_v2-128-float16",
    "gptq-128-float16-order", "gptq8-128-float16",
)  # fmt: skip


def _encodings() -> dict[str, list[str]]:
    """Encodings that the kernels of this build compute experts in, and those that are decoded for torch ("stock")."""
    from emoe import native
    from emoe.model.encoding import COMPUTED, ENCODINGS, encoding

    served: dict[str, list[str]] = {"native": list(COMPUTED), "stock": []}
    for name in (*(each for each, row in ENCODINGS.items() if not row.plain), *_SOME):
        served["native" if _serves(native.load(), encoding(name)) else "stock"].append(name)
    return served


def _serves(module: Any, how: Encoding) -> bool:
    scales = how.plane("scales")
    try:
        module.Weights(
            codes=how.codes, rows=256, depth=256, first=0, step=1, count=256,
            planes={plane.name: 0 for plane in how.planes}, scale=how.scale,
            scale_block=(0, 0) if scales is None else scales.block,
        )  # fmt: skip
    except (AttributeError, EmoeError):  # a build without encodings, or without this one
        return False
    return True


def _transformers(missing: list[str]) -> dict[str, Any]:
    try:
        from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
    except Exception as error:
        why = one_line(error)
        missing.append(f"this Transformers has no experts interface ({why}): pip install -U transformers")
        return {"experts_interface": False}
    return {"experts_interface": True, "implementations": sorted(ALL_EXPERTS_FUNCTIONS.valid_keys())}


def _memory() -> dict[str, Any]:
    import psutil

    machine = psutil.virtual_memory()
    result: dict[str, Any] = {
        "total_bytes": machine.total,
        "free_bytes": machine.available,
        "cgroup_limit_bytes": _cgroup_limit(),
    }
    try:
        from emoe.memory import available_memory

        result["usable_bytes"] = available_memory()
    except ImportError:
        result["usable_bytes"] = None
    return result


def _cgroup_limit() -> int | None:
    for file in _CGROUP_LIMITS:
        try:
            bound = Path(file).read_text().strip()
        except OSError:
            continue
        if bound.isdecimal() and int(bound) < _UNLIMITED:
            return int(bound)
    return None


def _cache(missing: list[str]) -> dict[str, Any]:
    from emoe.files import cache_folder

    folder = cache_folder()
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    writable = os.access(existing, os.W_OK)
    if not writable:
        missing.append(f"the cache folder {folder} cannot be written; set EMOE_CACHE to one that can")
    return {"folder": str(folder), "writable": writable, "free_bytes": shutil.disk_usage(existing).free}


def _print(found: dict[str, Any]) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in _rows(found):
        table.add_row(name, Text(value))
    out = common.console()
    out.print(table)
    out.print()
    if not found["missing"]:
        out.print("everything emoe needs is here", style="green")
    for sentence in found["missing"]:
        out.print(f"missing: {sentence}", style="red", markup=False)


def _rows(found: dict[str, Any]) -> list[tuple[str, str]]:
    from emoe.memory import format_bytes

    rows = [(name, value or "not installed") for name, value in found["versions"].items()]
    native, memory, cache = found["native"], found["memory"], found["cache"]
    if native["built"]:
        forced = f", forced by EMOE_FORCE_ISA={native['forced_isa']}" if native["forced_isa"] else ""
        rows += [
            ("native module", native["file"]),
            ("instruction set", f"{native['isa']}{forced} (this machine has {', '.join(native['available_isas'])})"),
            ("threads", str(native["threads"])),
            ("encodings", ", ".join(native["encodings"]["native"])),
            ("decoded for torch", ", ".join(native["encodings"]["stock"]) or "none"),
            ("readers", ", ".join(f"{kind}: {state}" for kind, state in native["readers"].items())),
        ]
    else:
        rows.append(("native module", native.get("error", "not built")))
    interface = found["transformers"]
    limit = memory["cgroup_limit_bytes"]
    usable = "" if memory["usable_bytes"] is None else f", {format_bytes(memory['usable_bytes'])} for this process"
    rows += [
        ("CUDA", native.get("cuda", "unknown: the native module did not load")),
        ("experts interface", "yes" if interface["experts_interface"] else "no: Transformers 5.20 or later is needed"),
        ("memory", f"{format_bytes(memory['free_bytes'])} free of {format_bytes(memory['total_bytes'])}{usable}"),
        ("cgroup limit", "none" if limit is None else format_bytes(limit)),
        ("cache folder", f"{cache['folder']} ({format_bytes(cache['free_bytes'])} free)"),
    ]
    return rows
