"""`emoe analyze` as a user types it."""

from __future__ import annotations

import json

import pytest
from commands import run, run_json
from made_traces import unrelated_trace

from emoe.trace.trace import load_trace, save_trace


@pytest.fixture
def prompts(tmp_path):
    file = tmp_path / "prompts.jsonl"
    lines = [
        {
            "task": task,
            "prompt": f"w{5 + number} w{20 + shift} w{30 + number}",
            "reference": f"w{40 + shift} w41 w42 w{43 + number}",
        }
        for shift, task in enumerate(("first", "second"))
        for number in range(4)
    ]
    file.write_text("\n".join(json.dumps(line) for line in lines))
    return file


def test_a_model_is_run_and_reported_in_one_command(model_folder, prompts, tmp_path, capsys):
    out = tmp_path / "report"
    status, values = run_json(
        capsys, "analyze", "--model", model_folder, "--prompts", prompts, "--resident", "0.6", "--quick", "--out", out
    )
    assert status == 0
    assert sorted(file.name for file in out.iterdir()) == ["report.html", "report.json", "timeline.json", "trace.npz"]
    assert values["facts"]["tasks"] == ["first", "second"] and values["facts"]["prompts"] == 8
    assert load_trace(out / "trace.npz").tokens == values["facts"]["tokens"] == 8 * 7
    (period,) = values["periods"]
    assert period["perplexity"] > 1 and period["forward_ms"] > 0 and 0 < period["coverage"] < 1
    assert set(values["sensitivity"]["tasks"]) == {"first", "second"}
    assert values["timeline"]["transfers"] > 0
    page = (out / "report.html").read_text()
    for heading in ("Correlation", "One base set", "Sensitivity", "Hit rate", "Hot sets", "Transfers against"):
        assert f"<h2>{heading}" in page
    events = json.loads((out / "timeline.json").read_text())["traceEvents"]
    assert {event["ph"] for event in events} == {"M", "X"}


def test_traces_are_reported_without_a_model(tmp_path, capsys):
    save_trace(unrelated_trace(prompts=16, tasks=2), tmp_path / "trace.npz")
    status, out, _ = run(capsys, "analyze", "--trace", tmp_path / "trace.npz", "--quick", "--out", tmp_path / "report")
    assert status == 0
    assert out.splitlines() == [f"html: {tmp_path}/report/report.html", f"json: {tmp_path}/report/report.json"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--trace", "missing.npz"], "there is no trace 'missing.npz'"),
        (["--trace", "a.npz", "--prompts", "b"], "with --trace there is none"),
        (["--prompts", "missing.jsonl"], "'missing.jsonl' is no file"),
        (["--trace", "a.npz", "--model", "b"], "not allowed with"),
        (["--resident", "2"], "is not a share"),
    ],
)
def test_mistakes_are_named(words, message, tmp_path, capsys):
    status, _, err = run(capsys, "analyze", *words, "--out", tmp_path / "report")
    assert status == 2 and message in err


def test_prompts_of_too_few_a_task_are_refused_before_the_model_is_loaded(model_folder, tmp_path, capsys):
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"task": "a", "prompt": "w3 w4"}\n' * 3)
    status, _, err = run(capsys, "analyze", "--model", model_folder, "--prompts", file, "--out", tmp_path / "report")
    assert status == 2 and "no task with at least 4 prompts" in err
