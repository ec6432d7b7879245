"""Checkpoints whose weights are encoded already are converted from the numbers that those stand for."""

from __future__ import annotations

import pytest
import quantized
import torch
from test_convert import IDS

import emoe
from emoe.convert.run import convert


def _logits(folder) -> torch.Tensor:
    model = emoe.from_pretrained(folder, memory_budget=1.0, kernels="stock", dtype="float32")
    with torch.no_grad():
        found = model(IDS).logits
    model.emoe.close(restore=False)
    return found


@pytest.mark.parametrize("name", sorted(quantized.FORMATS))
def test_every_format_that_is_read_can_be_the_source(name, tmp_path):
    """Outside experts its bytes are kept, so that a model of both kinds of encodings comes out."""
    source = quantized.write(tmp_path / "source", quantized.FORMATS[name])
    report = convert(source, tmp_path / "out", "q8_0", progress=False)
    assert "q8_0" in report.encodings
    before, after = _logits(source), _logits(tmp_path / "out")
    assert (after - before).abs().median() < 0.03 * (before.abs().median() + 1)
