"""`emoe calibrate`: the fit to forwards that were timed, what is kept of it, and the command."""

from __future__ import annotations

import json
import random
import time

import pytest
from commands import run, run_json

from emoe.engine import calibrate
from emoe.engine.calibrate import Calibration
from emoe.engine.costs import Costs

TRUTH = Costs(forward=0.004, row=0.0007, byte=1 / 3e9, expert=3e-6)


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("EMOE_CACHE", str(tmp_path))
    return tmp_path / "costs.json"


def machine(noise: float = 0.0, stall: float = 0.0):
    """A forward on paper: tokens route to experts at random, and the same tokens again load nothing."""
    chance, last = random.Random(1), None

    def forward(ids):
        nonlocal last
        experts = min(64, 8 * len(ids)) * 16 // 2 + chance.randint(0, 50)
        loaded = 0 if ids == last else 400_000 * experts // 2
        last = ids
        seconds = TRUTH.step(len(ids), loaded, experts) * chance.lognormvariate(0, noise)
        return seconds + (stall if chance.random() < 0.03 else 0.0), loaded, experts

    return forward


@pytest.mark.parametrize(("noise", "stall", "error"), [(0.0, 0.0, 0.01), (0.05, 0.0, 0.08), (0.0, 1.0, 0.05)])
def test_costs_foretell_steps_that_were_not_measured(noise, stall, error):
    told = []
    found = calibrate.measure(machine(noise, stall), 1000, told=told.append)
    assert sum(told) == found.forwards == 2 * calibrate.ROUNDS * len(calibrate.ROWS)
    assert found.error < error + noise
    for rows, loaded, experts in ((16, 0, 400), (16, 80_000_000, 400), (48, 200_000_000, 500)):
        assert found.costs.step(rows, loaded, experts) == pytest.approx(TRUTH.step(rows, loaded, experts), rel=0.12)


def test_what_was_measured_is_kept_for_a_week_and_by_key(own_cache, monkeypatch):
    calibrate.keep("a", Calibration(TRUTH, 0.05, 112))
    assert calibrate.kept("a") == Calibration(TRUTH, 0.05, 0)
    assert calibrate.kept("b") is None
    later = time.time() + calibrate.KEPT.seconds + 1
    monkeypatch.setattr(calibrate.time, "time", lambda: later)
    assert calibrate.kept("a") is None


def test_the_file_keeps_a_bounded_number_of_models_the_newest(own_cache, monkeypatch):
    clock = iter(range(10**9, 2 * 10**9))
    monkeypatch.setattr(calibrate.time, "time", lambda: float(next(clock)))
    for number in range(80):
        calibrate.keep(str(number), Calibration(TRUTH, 0.0, 1))
    known = json.loads(own_cache.read_text())
    assert len(known) == 64 and "79" in known and "0" not in known


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        '{"a": 1}',
        '{"a": {"costs": {"forward": 1}, "error": 0, "time": 1}}',
        '{"a": {"costs": {"forward": -1, "row": 0, "byte": 0, "expert": 0}, "error": 0, "time": 1}}',
        '{"a": {"costs": {"forward": 0, "row": 0, "byte": 0, "expert": 0}, "error": 0, "time": 1}}',
        '{"a": {"costs": {"forward": NaN, "row": 0, "byte": 0, "expert": 0}, "error": 0, "time": 1}}',
        '{"a": {"costs": {"forward": 1, "row": 0, "byte": 0, "expert": 0}, "error": "x", "time": 1}}',
        "\xff",
    ],
)
def test_a_damaged_file_is_said_and_measured_anew(own_cache, caplog, text):
    own_cache.write_bytes(text.encode("latin-1"))
    assert calibrate.kept("a") is None
    assert f"{own_cache} is damaged" in caplog.text
    calibrate.keep("a", Calibration(TRUTH, 0.05, 1))
    assert calibrate.kept("a") is not None


def test_a_cache_that_cannot_be_written_is_said_and_harms_nothing(tmp_path, monkeypatch, caplog):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("EMOE_CACHE", str(tmp_path / "file" / "below"))
    calibrate.keep("a", Calibration(TRUTH, 0.05, 1))
    assert calibrate.kept("a") is None
    assert "costs of steps are not kept" in caplog.text


def test_the_command_measures_once_and_shows_what_it_kept(own_cache, model_folder, capsys):
    words = ("calibrate", "--model", model_folder, "--memory-budget", "50%", "--context", 64)
    status, found = run_json(capsys, *words)
    assert status == 0 and found["forwards"] == 112
    assert set(found["costs"]) == {"forward", "row", "byte", "expert"} and 0 <= found["error"] < 1
    status, out, err = run(capsys, *words)
    assert "closed" not in err
    assert status == 0 and "kept from an earlier run" in out and "a forward" in out
    status, again = run_json(capsys, *words, "--refresh")
    assert status == 0 and again["forwards"] == 112
