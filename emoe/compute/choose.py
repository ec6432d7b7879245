"""Devices by name."""

from __future__ import annotations

import torch

from emoe import native
from emoe.compute.cpu import CpuDevice
from emoe.compute.cuda import Cuda
from emoe.compute.device import Device
from emoe.compute.emulated import Emulated
from emoe.errors import BackendUnavailable, ConfigError
from emoe.options import DEVICES


def open_device(name: str) -> Device:
    """The device of that name.

    Raises:
        ConfigError: the name is none of `emoe.options.DEVICES`, or no device has that index.
        BackendUnavailable: says which of driver, device, build is missing.
    """
    if name == "cpu":
        return CpuDevice()
    if name == "emulated":
        return Emulated(native.load_emulated(), 0)
    kind, _, index = name.partition(":")
    if kind != "cuda" or not (index.isdecimal() or name == "cuda"):
        raise ConfigError(f"device='{name}' is not one of: {DEVICES}")
    module = native.load()
    problem = module.cuda_status()["problem"]
    if problem:
        raise BackendUnavailable(f"device='{name}': {problem}")
    if not torch.cuda.is_available():
        raise BackendUnavailable(f"device='{name}': this torch ({torch.__version__}) is built without CUDA")
    return Cuda(module, int(index) if index else torch.cuda.current_device())
