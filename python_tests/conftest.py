"""Shared fixtures: tiny checkpoints of many families, built once a session; quiet Transformers."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny models: a second thread only waits, and the tests run side by side
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

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
