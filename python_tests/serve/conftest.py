"""A server on a real port, over a tiny model with a tokenizer of characters."""

from __future__ import annotations

import pytest

pytest.importorskip("fastapi", reason="needs emoe[serve]")

import serving


@pytest.fixture(scope="session")
def chat_folder(tmp_path_factory):
    return serving.save_model(tmp_path_factory.mktemp("chat"))


@pytest.fixture(scope="module")
def tiny(chat_folder):
    """(model, tokenizer), one for all tests of a module."""
    with serving.loaded(chat_folder) as both:
        yield both


@pytest.fixture(scope="module")
def server(tiny):
    """A server of the tiny model that all tests of a module share."""
    with serving.running(serving.engine_of(*tiny), tiny[1]) as running:
        yield running
