"""Access to the compiled module `emoe._C`: one place that says why it is missing or what it can do."""

from __future__ import annotations

import os
import threading
from functools import cache
from types import ModuleType
from typing import Any

from emoe.errors import BackendUnavailable, EmoeError


@cache  # asked at every call of a kernel; an error is not kept
def load() -> ModuleType:
    """Returns `emoe._C`.

    Raises:
        BackendUnavailable: the extension was not built or cannot be loaded; the message says which.
        ConfigError: EMOE_THREADS is no number of threads.
    """
    try:
        from emoe import _C
    except ImportError as error:
        raise BackendUnavailable(
            f"the native module emoe._C cannot be loaded ({error}); build it with 'pip install .' or 'make build'"
        ) from error
    _C.threads()  # so that EMOE_THREADS is refused before anything is loaded
    _shorten_spinning()
    return _C


def _shorten_spinning() -> None:
    """Has torch's OpenMP threads sleep soon after a loop, where torch was loaded before emoe could ask for that.

    libgomp, in torch's wheels, spins for some microseconds only while it has more threads than there are CPUs. So a
    thread of Python's begins a team of its own, which never works again. Where the user has said how OpenMP waits, that
    holds.
    """
    import torch

    if {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys() or torch.get_num_threads() == 1:
        return

    begun = threading.Event()

    def begin_a_team() -> None:
        try:
            torch.zeros(1 << 20).add_(1)
        finally:
            begun.set()
        threading.Event().wait()

    threading.Thread(target=begin_a_team, name="emoe-openmp", daemon=True).start()
    begun.wait(10)  # a process that ends while a thread of Python's is within torch is aborted


def load_emulated() -> ModuleType:
    """Returns `emoe._C_emulated`: the CUDA part on the fake runtime of the tests.

    Raises:
        BackendUnavailable: it was not built, as in every ordinary installation.
    """
    import torch  # noqa: F401

    try:
        from emoe import _C_emulated
    except ImportError as error:
        raise BackendUnavailable(
            f"device='emulated' is for tests and needs emoe._C_emulated ({error}); build it with 'make emulated'"
        ) from error
    return _C_emulated


def describe_cuda(module: ModuleType) -> str:
    """One line: what of CUDA is built and here, or which of build, driver, device is missing."""
    status = module.cuda_status()
    if not status["built"]:
        return f"not built: {status['problem']}"
    built = f"built with CUDA {_version(status['runtime'])} for {status['architectures']}"
    if status["problem"]:
        return f"{status['problem']} ({built})"
    devices = ", ".join(
        f"{each['index']}: {each['name']} (sm_{each['capability'][0]}{each['capability'][1]})"
        for each in status["devices"]
    )
    return f"{devices}; driver {_version(status['driver'])}, {built}"


def _version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"


def describe() -> dict[str, Any]:
    """What was built and what this machine offers; used by `emoe doctor`.

    Returns:
        built, cuda and, where built: file, isa ("none" where EMOE_FORCE_ISA names one that does not run),
        available_isas (best first), threads, readers (kind -> "O_DIRECT", "buffered" or "unavailable: why");
        `error` where something is amiss.
    """
    info: dict[str, Any] = {"built": False, "cuda": "unknown: the native module did not load"}
    try:
        module = load()
    except BackendUnavailable as error:
        info["error"] = str(error)
        return info
    info.update(
        built=True,
        file=module.__file__,
        isa="none",
        available_isas=list(module.available_isas()),
        threads=module.threads(),
        cuda=describe_cuda(module),
        readers={kind: _reader_state(module, kind) for kind in ("uring", "pread")},
    )
    try:
        info["isa"] = module.isa()
    except EmoeError as error:
        info["error"] = str(error)
    return info


def _reader_state(module: ModuleType, kind: str) -> str:
    try:
        reader = module.make_reader(kind)
    except EmoeError as error:
        return f"unavailable: {error}"
    return "O_DIRECT" if reader.direct else "buffered"
