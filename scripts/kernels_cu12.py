"""Builds the GPU kernels for CUDA 12 into one object file, with what PyPI has of CUDA 12.9 and the nvcc that is here.

    python scripts/kernels_cu12.py --nvidia .../site-packages/nvidia --out build/kernels_cu12.o

There is no nvcc 12 on PyPI, and PTX and runtime calls of nvcc 13 do not load under a CUDA 12 driver. So each half
comes from where it can: NVRTC 12.9 compiles the device code (machine code per architecture, PTX of two), and
nvcc 13 makes only the host's half of the file, the stubs that register and launch kernels by name; `fatbinary` packs
NVRTC's output, and g++ compiles the stubs with it. The object is linked with the static runtime 12.9. What is checked
here: every kernel that the stubs register is in every image under that name. That a GPU runs it is for
benchmarks/gpu_acceptance.py.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from cuda_matrix import ARCHS, PTX, Nvrtc

ROOT = Path(__file__).resolve().parent.parent


def run(command: list[str], **options: object) -> str:
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


def device_images(nvidia: Path, archs: tuple[str, ...], folder: Path) -> list[str]:
    """NVRTC's cubin of each architecture and PTX of those in PTX, as arguments of `fatbinary`."""
    compiler = Nvrtc(nvidia)
    print(f"NVRTC {compiler.version}")
    images = []
    for arch in archs:
        cubin = folder / f"sm_{arch}.cubin"
        cubin.write_bytes(compiler.compile(f"sm_{arch}"))
        images.append(f"--image3=kind=elf,sm={arch},file={cubin}")
    for arch in archs:
        if arch in PTX:
            ptx = folder / f"compute_{arch}.ptx"
            ptx.write_bytes(compiler.compile(f"compute_{arch}").rstrip(b"\0"))
            images.append(f"--image3=kind=ptx,sm={arch},file={ptx}")
    return images


def host_half(nvcc: str, folder: Path) -> tuple[str, list[str]]:
    """nvcc's host source of gather_mlp.cu, and the g++ command that it compiles it with."""
    command = [
        nvcc,
        "-std=c++20",
        "-O3",
        f"-I{ROOT / 'csrc'}",
        "-gencode=arch=compute_90,code=compute_90",
        "-Xcompiler",
        "-fPIC,-fvisibility=hidden",
    ]
    command += [
        "--keep",
        "--keep-dir",
        str(folder),
        "-c",
        str(ROOT / "csrc/cuda/gather_mlp.cu"),
        "-o",
        str(folder / "x.o"),
    ]
    lines = run([*command, "--dryrun"]).splitlines()
    compile_line = next(line for line in reversed(lines) if "cudafe1.cpp" in line and " -c " in line)
    run(command)
    return str(folder / "gather_mlp.cudafe1.cpp"), compile_line.removeprefix("#$ ").split(" ")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nvidia", type=Path, required=True, help="site-packages/nvidia with the cu12 packages")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--archs", nargs="+", default=list(ARCHS))
    args = parser.parse_args()
    nvcc = shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
    tools = Path(nvcc).resolve().parent
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source, compile_command = host_half(nvcc, folder)
        images = device_images(args.nvidia, tuple(args.archs), folder)
        # Uncompressed: what nvcc 13 compresses with, drivers of CUDA 12.0 to 12.3 do not read.
        fatbin = folder / "gather_mlp.fatbin.c"
        run([tools / "fatbinary", "-64", "--compress=false", *images, f"--embedded-fatbin={fatbin}"])
        stub = (folder / "gather_mlp.cudafe1.stub.c").read_text()
        registered = set(re.findall(r",\s*(_ZN4emoe\w+)\s*,\s*\(?-?\d+\)?\s*\)", stub))
        if not registered:
            raise SystemExit(
                f"no kernel is registered in nvcc's stubs, or not in the way this script knows:\n{stub[-2000:]}"
            )
        for arch in args.archs:
            image = (folder / f"sm_{arch}.cubin").read_bytes()
            missing = [kernel for kernel in registered if b".text." + kernel.encode() + b"\0" not in image]
            if missing:
                raise SystemExit(f"sm_{arch} lacks {len(missing)} of {len(registered)} kernels: {sorted(missing)}")
        command = [part.strip('"') for part in compile_command if part]
        place = next(i for i, part in enumerate(command) if part.endswith("cudafe1.cpp"))
        command[place] = source
        command[command.index("-o") + 1] = str(args.out.resolve())
        run([*command, f"-I{folder}"], cwd=folder)
    print(f"{args.out}: {len(registered)} kernels for sm_{', sm_'.join(args.archs)} and PTX of {', '.join(PTX)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
