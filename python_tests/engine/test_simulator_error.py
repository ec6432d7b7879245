"""The arithmetic of benchmarks/simulator_error.py; no model runs."""

from __future__ import annotations

import numpy as np
import pytest
from benchmark_files import benchmark

bench = benchmark("simulator_error")


@pytest.mark.parametrize("share", [0.5, 0.7, 1.0])
def test_targets_are_kept_by_the_share_that_they_are_for(share):
    chance = np.random.default_rng(0)
    found = {"ttft": chance.exponential(2.0, 500), "tpot": chance.exponential(0.1, 500), "bytes_per_token": 3.0}
    targets = bench.targets_of(found, share)
    assert bench.figures(found, targets)["attained"] == pytest.approx(share, abs=0.01)


def test_requests_that_found_the_engine_empty_count_for_bytes_only():
    found = {"ttft": [9.0, 9.0, *[1.0] * 8], "tpot": [9.0, 9.0, *[0.5] * 8], "bytes_per_token": 3.0}
    figures = bench.figures(found, {"ttft": 1.0, "tpot": 0.5})
    assert figures == {"ttft": 1.0, "tpot": 0.5, "attained": 1.0, "bytes_per_token": 3.0}
