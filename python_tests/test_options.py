"""Budgets as users write them, and the cache folder."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from emoe.errors import ConfigError
from emoe.files import cache_folder
from emoe.memory import format_bytes
from emoe.options import Budget, parse_budget


@pytest.mark.parametrize(
    ("value", "nbytes"),
    [("8GiB", 8 << 30), ("500MB", 500_000_000), ("1.5 GiB", 3 << 29), ("1048576", 1 << 20), ("7 b", 7), ("2kib", 2048),
     (" 3 TB ", 3 * 10**12), (4096, 4096), ("0.1MB", 100_000), ("8G", 8 << 30), ("8g", 8 << 30), ("512M", 512 << 20),
     ("1.5 T", 3 << 39), ("64k", 64 << 10), ("8GB", 8 * 10**9), ("8 GB", 8 * 10**9), ("8gb", 8 * 10**9)],
)  # fmt: skip
def test_bytes_are_read_from_numbers_and_units(value, nbytes):
    assert parse_budget(value) == Budget("bytes", nbytes=nbytes)


def test_a_float_is_a_share_and_auto_is_auto():
    assert parse_budget(0.25) == Budget("fraction", share=0.25)
    assert parse_budget(1.0) == parse_budget("100%") == Budget("fraction", share=1.0)
    assert parse_budget("25%") == parse_budget(" 25 % ") == parse_budget(0.25)
    assert parse_budget("auto") == parse_budget("AUTO") == Budget("auto")


@pytest.mark.parametrize(
    "value",
    [True, False, 0, -1, 0.0, -0.5, 1.5, float("nan"), float("inf"), None, "", "lots", "8 XiB", "-8GiB", "0GiB", "0.5",
     "8GiB9", "8 Gi", "8P", "9" * 5000, "9" * 50 + "TB", 1 << 128,
     float("-inf"), "1e9", "0%", "101%", "-5%", "%", "1_000", "8 Gi B", [8], b"8GiB"],
    ids=repr,
)  # fmt: skip
def test_everything_else_is_refused_with_the_value_and_the_choices(value):
    with pytest.raises(ConfigError, match=r"GiB.*share.*auto") as caught:
        parse_budget(value)
    assert repr(value) in str(caught.value)


@given(st.text())
def test_no_text_raises_anything_but_a_config_error(text):
    with contextlib.suppress(ConfigError):
        assert parse_budget(text).kind in ("bytes", "auto")


@given(st.integers(1, 10**18), st.sampled_from(["B", "KiB", "MB", "GiB", "TB"]))
def test_whole_amounts_are_exact(amount, unit):
    one = parse_budget(f"1{unit}").nbytes
    assert parse_budget(f"{amount} {unit}").nbytes == amount * one


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [(0, "0 bytes"), (1023, "1023 bytes"), (1024, "1.0 KiB"), (3 << 29, "1.5 GiB"), ((1 << 30) - 1, "1.0 GiB"),
     (5 << 40, "5.0 TiB"), (-2048, "-2.0 KiB")],
)  # fmt: skip
def test_sizes_are_written_with_one_decimal(nbytes, text):
    assert format_bytes(nbytes) == text


def test_the_cache_folder_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("EMOE_CACHE", str(tmp_path / "own"))
    assert cache_folder() == tmp_path / "own"
    assert (tmp_path / "own").is_dir()
    monkeypatch.delenv("EMOE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "emoe"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "emoe"


def test_a_cache_folder_that_cannot_be_made_is_named(monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("EMOE_CACHE", str(tmp_path / "file" / "below"))
    with pytest.raises(ConfigError, match=r"file/below.*EMOE_CACHE"):
        cache_folder()
