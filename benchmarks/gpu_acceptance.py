"""Everything that only a GPU can show, in one command: builds for it, checks it, measures it.

python benchmarks/gpu_acceptance.py [--device 0] [--minutes 60] [--checkpoints DIR] [--json FILE]
python benchmarks/gpu_acceptance.py --step kernels --step overlap      # some steps; --list names all
python benchmarks/gpu_acceptance.py --dry-run                          # on the emulation, small shapes

Each step is a process of its own with the time that is left, and its result is in the JSON as soon as it is there: a
run that is cut off loses one step, and the same command with --resume goes on with those that are not "ok". Steps:
build: for this GPU alone. tests: the native ones of the kernels, and the Python ones marked gpu; one that skips is a
failure. sanitizer: compute-sanitizer's memcheck, racecheck, synccheck and initcheck. Then what gpu_steps.py measures:
transfer; overlap, of emoe's own queue and kernels; kernels, values compared, against torch.nn.functional.grouped_mm and
the roofline; decode of the geometry of OLMoE-1B-7B and of 12 layers of Qwen3-30B-A3B, by share, with prefetch, hybrid
and resident, against Transformers and accelerate; graph, a captured step. Status 1: a step failed; 3: time ran out; 2:
nothing can be measured here.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
NATIVE_TESTS = ROOT / "build/gpu-tests"
RESULTS = Path(__file__).parent / "results"
OUTSIDE = ("build", "tests", "sanitizer")
MEASURED = ("transfer", "overlap", "kernels", "decode-olmoe", "decode-qwen3", "graph")
STEPS = (*OUTSIDE, *MEASURED)
SUITES = ("test_cuda_kernels", "test_cuda_encoded")  # native tests that run on a GPU as on the emulation
CHECKS = ("memcheck", "racecheck", "synccheck", "initcheck")
OK, FAILED, NO_TIME, DRY = "ok", "failed", "out of time", "needs a GPU"
OLDEST = {"torch": (2, 6), "transformers": (5, 20)}  # pyproject.toml


class OutOfTimeError(RuntimeError):
    """A step did not end in the time that was left."""


def version_problem(found: Mapping[str, str]) -> str:
    """What is too old, with what helps; "" where nothing is."""
    for name, oldest in OLDEST.items():
        numbers = tuple(int(part) for part in re.findall(r"\d+", found[name])[:2])
        if numbers < oldest:
            needed = ".".join(map(str, oldest))
            return f"{name} {found[name]} is older than {needed}: pip install '{name}>={needed}'"
    return ""


def gpu_problem() -> str:
    """Why there is nothing to measure, or ""."""
    import torch
    import transformers

    problem = version_problem({"torch": torch.__version__, "transformers": transformers.__version__})
    if problem or torch.cuda.is_available():
        return problem
    if shutil.which("nvidia-smi") is None:
        return "no CUDA driver is installed on this machine"
    return f"this torch ({torch.__version__}, CUDA {torch.version.cuda}) does not see a CUDA device"


def visible(device: int, mask: str | None) -> str:
    """CUDA_VISIBLE_DEVICES for a process that is to see this device alone, where a mask may be in force already."""
    return mask.split(",")[device].strip() if mask else str(device)


def run(command: list[object], seconds: float, **environment: str) -> str:
    """Its output; RuntimeError with the end of it where it fails, OutOfTimeError where it does not end in time."""
    words = [str(part) for part in command]
    try:
        done = subprocess.run(
            words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False, cwd=ROOT,
            env={**os.environ, **environment}, timeout=max(1.0, seconds),
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        raise OutOfTimeError(f"{' '.join(words)}: stopped after {seconds:.0f} s") from error
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(words)}: status {done.returncode}\n{done.stdout[-3000:]}")
    return done.stdout


def build(args: argparse.Namespace, until: float) -> dict[str, Any]:
    """A module for this GPU's architecture in place of the one that is here, and the native tests of its kernels."""
    import torch

    major, minor = torch.cuda.get_device_capability(args.device)
    started, arch = time.monotonic(), f"{major}{minor}-real"
    run(
        [sys.executable, "-m", "pip", "install", "--quiet", "--no-build-isolation", "--no-deps", "-e", "."],
        until - time.monotonic(), EMOE_CUDA="1", EMOE_CUDA_ARCHS=arch,
    )  # fmt: skip
    options = ["-DEMOE_TESTS=ON", "-DEMOE_CUDA=1", f"-DEMOE_CUDA_ARCHS={arch}", "-DCMAKE_BUILD_TYPE=Release"]
    run(["cmake", "-G", "Ninja", "-S", ROOT, "-B", NATIVE_TESTS, *options], until - time.monotonic())
    run(["cmake", "--build", NATIVE_TESTS, "--target", *SUITES], until - time.monotonic())
    doctor = subprocess.run(
        [sys.executable, "-m", "emoe", "doctor", "--json"], stdout=subprocess.PIPE, text=True, check=False, cwd=ROOT
    )
    return {"seconds": time.monotonic() - started, "doctor": json.loads(doctor.stdout)["native"]["cuda"]}


def skipped(summary: str) -> list[str]:
    """Lines of pytest's summary (-rs) about tests that did not run."""
    return [line for line in summary.splitlines() if line.startswith("SKIPPED")]


def tests(args: argparse.Namespace, until: float) -> dict[str, Any]:
    """Kernels against the fp64 reference; models end to end against the CPU path."""
    alone = visible(args.device, os.environ.get("CUDA_VISIBLE_DEVICES"))
    native = [run([NATIVE_TESTS / each], until - time.monotonic(), CUDA_VISIBLE_DEVICES=alone) for each in SUITES]
    out = run(
        [sys.executable, "-m", "pytest", "-q", "-rs", "-m", "gpu", "python_tests"],
        until - time.monotonic(), EMOE_TEST_DEVICE=f"cuda:{args.device}",
    )  # fmt: skip
    if skips := skipped(out):
        raise RuntimeError("tests that need this GPU were skipped:\n" + "\n".join(skips))
    return {
        "native": "; ".join(each.strip().splitlines()[-1] for each in native),
        "python": out.strip().splitlines()[-1],
    }


def sanitizer(args: argparse.Namespace, until: float) -> dict[str, Any]:
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        raise RuntimeError("compute-sanitizer is not on PATH; it comes with the CUDA toolkit")
    alone = visible(args.device, os.environ.get("CUDA_VISIBLE_DEVICES"))
    for check, suite in itertools.product(CHECKS, SUITES):
        run(
            [tool, "--tool", check, "--error-exitcode", "9", NATIVE_TESTS / suite],
            until - time.monotonic(), CUDA_VISIBLE_DEVICES=alone,
        )  # fmt: skip
    return dict.fromkeys(CHECKS, "no report")


def measured(name: str, args: argparse.Namespace, until: float) -> dict[str, Any]:
    """A step of gpu_steps.py, in a process that sees the module which `build` made."""
    device = "emulated" if args.dry_run else f"cuda:{args.device}"
    command: list[object] = [sys.executable, __file__, "--child", name, "--on", device]
    command += ["--checkpoints", args.checkpoints, *["--quick"] * (args.quick or args.dry_run)]
    result: dict[str, Any] = json.loads(run(command, until - time.monotonic()).splitlines()[-1])
    return result


def measure(name: str, args: argparse.Namespace, until: float) -> dict[str, Any]:
    """One step: its state, and figures or why there are none."""
    started = time.monotonic()
    if args.dry_run and name in OUTSIDE:
        return {"state": DRY}
    if started >= until:
        return {"state": NO_TIME, "why": "not run: no time was left"}
    try:
        steps = {"build": build, "tests": tests, "sanitizer": sanitizer}
        figures = steps[name](args, until) if name in steps else measured(name, args, until)
        return {"state": OK, "took_seconds": time.monotonic() - started, **figures}
    except OutOfTimeError as error:
        return {"state": NO_TIME, "why": str(error)}
    except Exception as error:  # any: the other steps are measured all the same
        return {"state": FAILED, "why": str(error)}


def saved(path: Path, report: dict[str, Any]) -> None:
    """The file is the old report or this one, whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
        file.write(json.dumps(report, indent=1) + "\n")
    Path(file.name).replace(path)


def begun(path: Path, identity: dict[str, str], resume: bool) -> dict[str, Any]:
    """The report to go on with: an old one of the same GPU and versions where that is asked for."""
    if resume and path.is_file():
        old = json.loads(path.read_text())
        if all(old.get(key) == value for key, value in identity.items()):
            return {**old, "steps": dict(old["steps"])}
    return {**identity, "date": time.strftime("%Y-%m-%d"), "steps": {}}


def show(report: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=f"GPU acceptance: {report['gpu']}")
    for column in ("step", "result", "figures"):
        table.add_column(column, overflow="fold")
    for name, result in report["steps"].items():
        figures = {key: value for key, value in result.items() if key not in ("state", "why")}
        text = result.get("why") or "\n".join(
            "\n".join(", ".join(f"{k} {_short(v)}" for k, v in row.items()) for row in value)
            if isinstance(value, list)
            else f"{key}: {_short(value)}"
            for key, value in figures.items()
        )
        table.add_row(name, result["state"], Text(text))
    Console().print(table)


def _short(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def child(args: argparse.Namespace) -> int:
    sys.path.insert(0, str(Path(__file__).parent))
    import gpu_steps

    args.checkpoints.mkdir(parents=True, exist_ok=True)
    print(json.dumps(gpu_steps.STEPS[args.child](gpu_steps.Bench(args.on, args.quick, args.checkpoints))))
    return 0


def parsed(words: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", type=int, default=0, help="of those that CUDA_VISIBLE_DEVICES leaves")
    parser.add_argument("--step", action="append", choices=STEPS, help="only this; may be given again")
    parser.add_argument("--skip", nargs="+", default=[], choices=STEPS)
    parser.add_argument("--minutes", type=float, default=24 * 60.0, help="for all steps")
    parser.add_argument("--resume", action="store_true", help="steps that are ok in the JSON are not run again")
    parser.add_argument("--checkpoints", type=Path, default=Path(tempfile.gettempdir()) / "emoe-gpu-acceptance",
                        help="folder for models with random weights, 14 GB each")  # fmt: skip
    parser.add_argument("--json", type=Path, default=RESULTS / "gpu_acceptance.json")
    parser.add_argument("--quick", action="store_true", help="small shapes")
    parser.add_argument("--dry-run", action="store_true", help="on the emulation (make emulated); times mean nothing")
    parser.add_argument("--list", action="store_true", help="name the steps")
    parser.add_argument("--child", choices=MEASURED, help=argparse.SUPPRESS)
    parser.add_argument("--on", default="", help=argparse.SUPPRESS)
    return parser.parse_args(words)


def main(words: list[str] | None = None) -> int:
    args = parsed(words)
    if args.list:
        print("\n".join(STEPS))
        return 0
    if args.child:
        return child(args)
    import torch
    import transformers

    problem = "" if args.dry_run else gpu_problem()
    if problem:
        print(f"nothing is measured: {problem}", file=sys.stderr)
        return 2
    identity = {
        "machine": platform.node(), "torch": torch.__version__, "transformers": transformers.__version__,
        "gpu": "emulated, a dry run" if args.dry_run else torch.cuda.get_device_name(args.device),
    }  # fmt: skip
    report = begun(args.json, identity, args.resume)
    until = time.monotonic() + 60 * args.minutes
    for name in STEPS:
        wanted = name in args.step if args.step else name not in args.skip
        if wanted and report["steps"].get(name, {}).get("state") != OK:
            report["steps"][name] = measure(name, args, until)
            saved(args.json, report)
    show(report)
    states = {step["state"] for step in report["steps"].values()}
    return 1 if FAILED in states else 3 if NO_TIME in states else 0


if __name__ == "__main__":
    sys.exit(main())
