"""Builds wheels without and with the CUDA part, repairs them, installs each into an environment of its own and looks.

    python scripts/wheels.py                  cpu, cu12 and cu13, into dist/
    python scripts/wheels.py cpu cu13         some; cu12 needs --nvidia (CONTRIBUTING.md)
    python scripts/wheels.py cu13 --archs 90  for one architecture only (quick, not for publishing)

A wheel passes when `emoe doctor` of the new environment loads the native module from there, says what was built, and,
on a machine without a driver, that there is none; and when a tiny model answers on the CPU (with --demo, the demo
model too). The dependencies (torch, transformers, ...) are those of the environment this runs in, through a path
file: nothing is downloaded for them.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from cuda_matrix import ARCHS, PTX

ROOT = Path(__file__).resolve().parent.parent
TINY = """
import sys, tempfile
sys.path.insert(0, sys.argv[1])
import torch, emoe, families
folder = tempfile.mkdtemp()
families.save("qwen3_moe", __import__("pathlib").Path(folder), torch.float32)
model = emoe.from_pretrained(folder, memory_budget=0.5)
print(emoe.__file__)
print(model.generate(torch.arange(3, 9).view(1, -1), max_new_tokens=4, do_sample=False, pad_token_id=0).tolist())
"""


def run(command: list[object], **options: object) -> str:
    done = subprocess.run(
        [str(part) for part in command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        **options,
    )  # type: ignore[call-overload]
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(map(str, command))}\n{done.stdout[-4000:]}")
    return str(done.stdout)


def nvcc_version() -> str:
    nvcc = shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
    found = re.search(r"release (\d+)\.(\d+)", run([nvcc, "--version"]))
    if found is None:
        raise SystemExit(f"{nvcc} --version names no release")
    return f"cu{found[1]}{found[2]}"


def options_of(kind: str, args: argparse.Namespace, folder: Path) -> tuple[str, dict[str, str]]:
    """Local version label and environment of one build."""
    if kind == "cpu":
        return "cpu", {"EMOE_CUDA": "0"}
    archs = ";".join(arch if arch in PTX else f"{arch}-real" for arch in args.archs)
    if kind == "cu13":
        return nvcc_version(), {"EMOE_CUDA": "1", "EMOE_CUDA_ARCHS": archs}
    if args.nvidia is None:
        raise SystemExit(
            "cu12 needs --nvidia: the site-packages/nvidia folder with PyPI's cu12 packages (CONTRIBUTING.md)"
        )
    kernels = folder / "kernels_cu12.o"
    script = ROOT / "scripts" / "kernels_cu12.py"
    print(run([sys.executable, script, "--nvidia", args.nvidia, "--out", kernels, "--archs", *args.archs]), end="")
    return "cu129", {
        "EMOE_CUDA": "1",
        "EMOE_CUDA_ARCHS": archs,
        "EMOE_CUDA_KERNELS": str(kernels),
        "EMOE_CUDA_ROOT": f"{args.nvidia / 'cuda_runtime'};{args.nvidia / 'cuda_nvcc'}",
    }


def build(kind: str, args: argparse.Namespace, folder: Path) -> Path:
    """The repaired wheel."""
    label, environment = options_of(kind, args, folder)
    source = folder / "source"
    source.mkdir()
    for name in run(["git", "-C", ROOT, "ls-files"]).splitlines():
        if name.split("/")[0] in ("csrc", "cmake", "emoe") or "/" not in name:
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, source / name)
    project = source / "pyproject.toml"
    project.write_text(re.sub(r'^version = "([^"+]+)"', rf'version = "\1+{label}"', project.read_text(), flags=re.M))
    raw = folder / "raw"
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    run(
        [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", raw, source],
        env={**os.environ, **environment, "PATH": path},
    )
    [wheel] = raw.glob("*.whl")
    repaired = folder / "repaired"
    run([sys.executable, "-m", "auditwheel", "repair", "-w", repaired, wheel], env={**os.environ, "PATH": path})
    [wheel] = repaired.glob("*.whl")
    args.out.mkdir(parents=True, exist_ok=True)
    return Path(shutil.copy2(wheel, args.out))


def examine(wheel: Path, folder: Path, demo: bool) -> dict[str, object]:
    """Installs the wheel into a new environment and asks it what it is."""
    environment = folder / "environment"
    run([sys.executable, "-m", "venv", environment])
    python = environment / "bin" / "python"
    run([python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", wheel])
    site = run([python, "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])"]).strip()
    here = [path for path in sys.path if path.endswith("site-packages")]
    (Path(site) / "dependencies.pth").write_text("\n".join(here) + "\n")
    report = subprocess.run(
        [python, "-m", "emoe", "doctor", "--json"], stdout=subprocess.PIPE, text=True, cwd=folder, check=False
    )
    native = json.loads(report.stdout)["native"]
    if not str(native.get("file", "")).startswith(str(environment)):
        raise SystemExit(f"{wheel.name}: the native module is not the wheel's: {native}")
    answer = run([python, "-c", TINY, ROOT / "python_tests"], cwd=folder).splitlines()
    if not answer[-2].startswith(str(environment)):
        raise SystemExit(f"{wheel.name}: emoe was imported from {answer[-2]}")
    if demo:
        run([python, "-m", "emoe", "demo", "--prompt", "Say hello.", "--max-new-tokens", "8"], cwd=folder)
    return {"wheel": wheel.name, "bytes": wheel.stat().st_size, "cuda": native["cuda"], "tokens": answer[-1]}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kinds", nargs="*", choices=["cpu", "cu12", "cu13", []], default=[])
    parser.add_argument("--out", type=Path, default=ROOT / "dist")
    parser.add_argument("--archs", nargs="+", default=list(ARCHS), metavar="SM")
    parser.add_argument("--demo", action="store_true", help="run `emoe demo` too; the first time it fetches 93 MB")
    parser.add_argument("--nvidia", type=Path, default=os.environ.get("EMOE_NVIDIA"))
    args = parser.parse_args()
    args.nvidia = Path(args.nvidia) if args.nvidia else None
    for kind in args.kinds or ["cpu", "cu12", "cu13"]:
        with tempfile.TemporaryDirectory() as name:
            found = examine(build(kind, args, Path(name)), Path(name), args.demo)
            print(f"{found['wheel']}: {found['bytes']} bytes; doctor: {found['cuda']}; {found['tokens']}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
