"""Compiles csrc/cuda for every published architecture and compares what the kernels use with csrc/cuda/resources.json.

    python scripts/cuda_matrix.py --check        # fails on spills, a changed table, a tiles kernel without tensor cores
    python scripts/cuda_matrix.py --write        # writes the table anew
    python scripts/cuda_matrix.py --nvrtc        # the same kernels through NVRTC (CUDA 12.x), spills and instances only
    python scripts/cuda_matrix.py --clang        # and through clang (EMOE_CLANG, clang++-19), instances only

Needs nvcc, or for --nvrtc and --clang the folder of PyPI's nvidia-cuda-{nvrtc,runtime,nvcc,cccl}-cu12 (EMOE_NVIDIA, by
default found beside this Python). cuobjdump (PATH, EMOE_CUOBJDUMP, or PyPI's nvidia-cuda-cuobjdump and
nvidia-cuda-nvdisasm) reads the SASS; without it that check is reported as not made. Nothing is run: no GPU is needed.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TABLE = ROOT / "csrc/cuda/resources.json"
SOURCE = ROOT / "csrc/cuda/gather_mlp.cu"
ARCHS = ("80", "86", "89", "90", "100", "120")
PTX = ("90", "120")  # for architectures between these and later ones
CLANG_ARCHS = ("80", "86", "89", "90")  # of clang 19
HOST_WARNINGS = "-Wall,-Wextra,-Wshadow,-Wconversion,-Wno-sign-conversion"
# What the SASS of a kernel has to contain: tensor cores, ldmatrix, cp.async; 16-byte loads.
EXPECTED_SASS = {
    "tiles_kernel": ("HMMA.16816.F32", "LDSM.16.M", "LDGSTS.E.BYPASS"),
    "encoded_tiles_kernel": ("HMMA.16816.F32", "LDSM.16.M", "LDGSTS.E.BYPASS"),
    "rows_kernel<float, true": ("LDG.E.NA.128",),
    "rows_kernel<half, true": ("LDG.E.NA.128",),
    "rows_kernel<bf16, true": ("LDG.E.NA.128",),
}

Table = dict[str, dict[str, dict[str, int]]]  # kernel -> architecture -> registers, shared, stack, spills


class MatrixError(Exception):
    """Something is not as it has to be; the message says what."""


def run(command: list[str], path: Path | None = None) -> str:
    """Standard output and error of a command that succeeds, with the folder `path` on PATH.

    Raises:
        MatrixError: it does not.
    """
    environment = {**os.environ, "PATH": f"{path}{os.pathsep}{os.environ['PATH']}"} if path else None
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False, env=environment
    )
    if done.returncode != 0:
        raise MatrixError(f"{' '.join(command)}\n{done.stdout}")
    return done.stdout


def short_name(demangled: str) -> str:
    """ "rows_kernel<bf16, true, false, true>" from what c++filt prints."""
    name = demangled.replace("void emoe::cuda::", "").replace("emoe::cuda::", "").split("(emoe")[0].split("(void")[0]
    name = re.sub(r"\(const .*|\(float const.*|\(((?:Encoded)?Product|Picking|Sorting)\).*", "", name)
    name = name.replace("__nv_bfloat16", "bf16").replace("__half", "half")
    return name.replace("(bool)1", "true").replace("(bool)0", "false").strip()


def demangle(names: list[str]) -> dict[str, str]:
    shown = subprocess.run(["c++filt"], input="\n".join(names), stdout=subprocess.PIPE, text=True, check=True).stdout
    return {name: short_name(line) for name, line in zip(names, shown.splitlines(), strict=True)}


def parse_ptxas(text: str) -> Table:
    """The table of `ptxas -v`.

    Raises:
        MatrixError: nothing like it is in the text.
    """
    entries = re.findall(
        r"Compiling entry function '(\S+)' for 'sm_(\d+\w?)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, "
        r"(\d+) bytes spill loads.*?Used (\d+) registers([^\n]*)",
        text,
        re.DOTALL,
    )
    if not entries:
        raise MatrixError("ptxas -v printed no kernels")
    names = demangle(sorted({entry[0] for entry in entries}))
    table: Table = {}
    for mangled, arch, stack, stores, loads, registers, rest in entries:
        shared = re.search(r"(\d+) bytes smem", rest)
        table.setdefault(names[mangled], {})[f"sm_{arch}"] = {
            "registers": int(registers),
            "shared": int(shared[1]) if shared else 0,
            "stack": int(stack),
            "spills": int(stores) + int(loads),
        }
    return {name: dict(sorted(table[name].items())) for name in sorted(table)}


def compile_nvcc(archs: tuple[str, ...], folder: Path) -> tuple[str, Table, Path]:
    """Compiler version, table and object of all architectures, warnings being errors."""
    nvcc = shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
    version = re.search(r"V(\d+\.\d+\.\d+)", run([nvcc, "--version"]))
    if version is None:
        raise MatrixError(f"{nvcc} --version names no version")
    target = folder / "gather_mlp.o"
    targets = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in archs]
    targets += [f"-gencode=arch=compute_{a},code=compute_{a}" for a in archs if a in PTX]
    command = [nvcc, "-std=c++20", "-O3", f"-I{ROOT / 'csrc'}", "-Werror", "all-warnings"]
    command += ["-Xptxas", "-v,--warn-on-spills,-Werror", "-Xcompiler", HOST_WARNINGS]
    text = run([*command, *targets, "-c", str(SOURCE), "-o", str(target)])
    return version[1], parse_ptxas(text), target


def problems_of(table: Table) -> list[str]:
    """Spills and stack frames, which no kernel may have."""
    return [
        f"{kernel} on {arch}: {used['spills']} bytes spilled, {used['stack']} bytes of stack"
        for kernel, archs in table.items()
        for arch, used in archs.items()
        if used["spills"] or used["stack"]
    ]


def compare(recorded: Table, table: Table) -> list[str]:
    """What changed, one line each."""
    lines = []
    for kernel in sorted(recorded.keys() | table.keys()):
        before, now = recorded.get(kernel, {}), table.get(kernel, {})
        for arch in sorted(before.keys() | now.keys()):
            if before.get(arch) != now.get(arch):
                lines.append(f"{kernel} on {arch}: {before.get(arch, 'not recorded')} -> {now.get(arch, 'gone')}")
    return lines


def find_cuobjdump() -> str | None:
    named = os.environ.get("EMOE_CUOBJDUMP")
    if named:
        return named
    beside = sorted(Path(sysconfig.get_paths()["purelib"]).glob("nvidia/*/bin/cuobjdump"))
    return shutil.which("cuobjdump") or (str(beside[0]) if beside else None)


def check_sass(cuobjdump: str, target: Path, archs: tuple[str, ...]) -> list[str]:
    """Kernels whose machine code lacks an instruction of EXPECTED_SASS."""
    problems = []
    for arch in archs:
        # It runs nvdisasm, which PyPI's nvidia-cuda-nvdisasm puts beside it.
        text = run([cuobjdump, "-sass", "-arch", f"sm_{arch}", str(target)], Path(cuobjdump).parent)
        parts = re.split(r"\n\s*Function : (\S+)\n", text)[1:]
        bodies = dict(zip(parts[::2], parts[1::2], strict=True))
        names = demangle(list(bodies))
        for mangled, body in bodies.items():
            for prefix, wanted in EXPECTED_SASS.items():
                if names[mangled].startswith(prefix):
                    missing = [word for word in wanted if word not in body]
                    problems += [f"{names[mangled]} on sm_{arch}: no {word} in its SASS" for word in missing]
        tiles = sum(name.startswith("tiles_kernel") for name in names.values())
        if tiles != 8:
            problems.append(f"sm_{arch}: {tiles} tiles kernels in the object, not 8")
    return problems


class Nvrtc:
    """libnvrtc of PyPI's packages, through ctypes.

    Raises:
        MatrixError: the folder holds no NVRTC.
    """

    def __init__(self, folder: Path) -> None:
        libraries = sorted(folder.glob("cuda_nvrtc/lib/libnvrtc.so.*"))
        if not libraries:
            raise MatrixError(f"{folder} holds no cuda_nvrtc/lib/libnvrtc.so: pip install nvidia-cuda-nvrtc-cu12")
        for builtins in sorted(folder.glob("cuda_nvrtc/lib/libnvrtc-builtins.so.*")):
            ctypes.CDLL(str(builtins), mode=ctypes.RTLD_GLOBAL)
        self.library = ctypes.CDLL(str(libraries[0]))
        self.includes = [f"-I{folder / part / 'include'}" for part in ("cuda_runtime", "cuda_cccl", "cuda_nvcc")]
        major, minor = ctypes.c_int(), ctypes.c_int()
        self.library.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
        self.version = f"{major.value}.{minor.value}"

    def _text(self, program: ctypes.c_void_p, what: str) -> bytes:
        size = ctypes.c_size_t()
        getattr(self.library, f"nvrtcGet{what}Size")(program, ctypes.byref(size))
        buffer = ctypes.create_string_buffer(size.value)
        getattr(self.library, f"nvrtcGet{what}")(program, buffer)
        return buffer.raw

    def compile(self, target: str) -> bytes:
        """csrc/cuda/instances.cuh as a cubin ("sm_90") or as PTX ("compute_120"); ptxas's words stay in `log`.

        Raises:
            MatrixError: an error or a warning.
        """
        program = ctypes.c_void_p()
        source = b'#include "cuda/instances.cuh"\n'
        self.library.nvrtcCreateProgram(ctypes.byref(program), source, b"instances.cu", 0, None, None)
        options = [f"--gpu-architecture={target}", "--std=c++20", f"-I{ROOT / 'csrc'}", *self.includes]
        cubin = target.startswith("sm_")
        if cubin:
            options += ["--ptxas-options=-v", "--ptxas-options=--warn-on-spills"]
        array = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
        code = self.library.nvrtcCompileProgram(program, len(options), array)
        self.log = self._text(program, "ProgramLog").decode(errors="replace")
        if code != 0 or "warning" in self.log:
            raise MatrixError(f"NVRTC {self.version} for {target}: code {code}\n{self.log}")
        return self._text(program, "CUBIN" if cubin else "PTX")


def nvidia_folder() -> Path:
    return Path(os.environ.get("EMOE_NVIDIA") or Path(sysconfig.get_paths()["purelib"]) / "nvidia")


def other_instances(table: Table, compiled: str) -> list[str]:
    """What differs between the kernels of another compiler and those of the recorded table."""
    recorded: Table = json.loads(TABLE.read_text())["kernels"]
    differ = sorted(table.keys() ^ recorded.keys())
    return [f"{compiled}: the instances differ from nvcc's: {differ}"] if differ else []


def toolkit_for_clang(nvidia: Path, folder: Path) -> Path:
    """PyPI's packages laid out as clang looks for a toolkit.

    Raises:
        MatrixError: a package is not there.
    """
    includes = [nvidia / part / "include" for part in ("cuda_runtime", "cuda_nvcc", "cuda_cccl")]
    tools = [nvidia / "cuda_nvcc/nvvm", nvidia / "cuda_nvcc/bin"]
    missing = [str(part) for part in (*includes, *tools) if not part.is_dir()]
    if missing:
        raise MatrixError(f"not there: {', '.join(missing)} (pip install nvidia-cuda-{{runtime,nvcc,cccl}}-cu12)")
    (folder / "include").mkdir()
    for each in (each for part in includes for each in part.iterdir()):
        (folder / "include" / each.name).symlink_to(each)
    (folder / "include/curand_mtgp32_kernel.h").touch()  # clang includes it of itself; nothing here uses cuRAND
    for tool in tools:
        (folder / tool.name).symlink_to(tool)
    return folder


def main_clang(archs: tuple[str, ...]) -> list[str]:
    clang = os.environ.get("EMOE_CLANG") or shutil.which("clang++-19") or shutil.which("clang++")
    if clang is None:
        raise MatrixError("no clang++: EMOE_CLANG names one, or clang++-19 or clang++ on PATH")
    version = re.search(r"clang version (\S+)", run([clang, "--version"]))
    problems = []
    with tempfile.TemporaryDirectory() as folder:
        toolkit = toolkit_for_clang(nvidia_folder(), Path(folder))
        command = [clang, "-x", "cuda", "-std=c++20", "-O3", f"--cuda-path={toolkit}", f"-I{ROOT / 'csrc'}", "-Werror"]
        command += HOST_WARNINGS.split(",")
        # The version is newer than clang 19 knows; and it warns of loops that have nothing to unroll in an instance.
        command += ["-Wno-unknown-cuda-version", "-Wno-pass-failed"]
        command += ["-c", str(SOURCE), "-o", f"{folder}/out.o"]
        # Each half by itself: what packs them, `fatbinary`, is not on PyPI.
        run([*command, "--cuda-host-only"])
        command += ["--cuda-device-only", "-Xcuda-ptxas", "-v", "-Xcuda-ptxas", "--warn-on-spills"]
        for arch in archs:
            start = time.monotonic()
            table = parse_ptxas(run([*command, f"--cuda-gpu-arch=sm_{arch}"]))
            name = f"clang {version[1] if version else '?'} sm_{arch}"
            # A spill is shown only: what a wheel holds is nvcc's and NVRTC's code.
            problems += other_instances(table, name)
            print(f"{name}: {len(table)} kernels, {time.monotonic() - start:.1f} s", *problems_of(table), sep="\n    ")
    return problems


def main_nvrtc(archs: tuple[str, ...]) -> list[str]:
    nvrtc = Nvrtc(nvidia_folder())
    problems = []
    for arch in archs:
        start = time.monotonic()
        cubin = nvrtc.compile(f"sm_{arch}")
        table = parse_ptxas(nvrtc.log)
        problems += problems_of(table) + other_instances(table, f"NVRTC {nvrtc.version} sm_{arch}")
        print(f"NVRTC {nvrtc.version} sm_{arch}: {len(table)} kernels, {len(cubin)} bytes, "
              f"{time.monotonic() - start:.1f} s")  # fmt: skip
    return problems


def main_nvcc(archs: tuple[str, ...], write: bool) -> list[str]:
    with tempfile.TemporaryDirectory() as folder:
        start = time.monotonic()
        version, table, target = compile_nvcc(archs, Path(folder))
        print(f"nvcc {version}: {len(table)} kernels for {', '.join('sm_' + a for a in archs)} and PTX of "
              f"{', '.join(PTX)}, {time.monotonic() - start:.0f} s")  # fmt: skip
        problems = problems_of(table)
        if write and not problems:
            TABLE.write_text(json.dumps({"nvcc": version, "kernels": table}, indent=1) + "\n")
        cuobjdump = find_cuobjdump()
        if cuobjdump is None:
            print("SASS: not checked (no cuobjdump: pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm)")
        else:
            try:
                sass = check_sass(cuobjdump, target, archs)
            except MatrixError as failure:
                sass = [str(failure)]
            problems += sass
            print(f"SASS: {'as expected' if not sass else 'not as expected'} on {len(archs)} architectures")
    if write:
        return problems
    recorded = json.loads(TABLE.read_text())
    part = {kernel: {f"sm_{a}": used[f"sm_{a}"] for a in archs if f"sm_{a}" in used}
            for kernel, used in recorded["kernels"].items()}  # fmt: skip
    if recorded["nvcc"] == version:
        problems += compare(part, table)
    elif part.keys() != table.keys():
        problems.append(f"kernels differ: {sorted(part.keys() ^ table.keys())}")
    else:
        print(f"registers: not compared, the table is of nvcc {recorded['nvcc']}")
    return problems


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--check", action="store_true", help="compare with the recorded table")
    what.add_argument("--write", action="store_true", help="record the table")
    what.add_argument("--nvrtc", action="store_true", help="compile through NVRTC")
    what.add_argument("--clang", action="store_true", help="compile through clang")
    parser.add_argument("--arch", nargs="+", choices=ARCHS, default=ARCHS, help="a part of the architectures")
    arguments = parser.parse_args()
    archs = tuple(arguments.arch)
    if arguments.write and archs != ARCHS:
        parser.error("--write needs all architectures")
    try:
        if arguments.nvrtc:
            problems = main_nvrtc(archs)
        elif arguments.clang:
            problems = main_clang(tuple(arch for arch in archs if arch in CLANG_ARCHS))
        else:
            problems = main_nvcc(archs, arguments.write)
    except MatrixError as failure:
        problems = [str(failure)]
    for problem in problems:
        print(f"FAILED {problem}")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
