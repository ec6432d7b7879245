"""The arithmetic of benchmarks/paper.py, and what it keeps of a child that does not end well; no model runs."""

from __future__ import annotations

import sys

import pytest
from benchmark_files import benchmark

paper = benchmark("paper")


def steps(context: int) -> int:
    """Pages of 64 tokens, and a part that grows faster."""
    return 1000 + 640 * -(-context // 64) + context * context // 500


@pytest.mark.parametrize("needed", [steps, lambda context: 1000 + 10 * context], ids=["pages", "straight"])
@pytest.mark.parametrize("budget", [1650, 5000, 123_456, 900_000])
def test_the_longest_context_is_the_last_whose_plan_fits(needed, budget):
    asked = []

    def plan(context):
        asked.append(context)
        return needed(context)

    found = paper.most_context(plan, budget, 10, 8192)
    assert needed(found) <= budget
    assert found == 8192 or needed(found + 1) > budget
    assert len(asked) <= 120  # of 8192; a plan takes a second


def test_where_not_even_the_shortest_fits_there_is_no_context():
    assert paper.most_context(steps, 1000, 10, 8192) == 0


def row(share, mode, do, speed, latency):
    return {"share": share, "mode": mode, "do": do, "tokens_per_second": speed, "latency": latency}


def test_what_falls_short_of_the_paper_is_said_with_its_figure():
    memory = [
        {"who": "Transformers, all in memory", "prompt": 100, "batch": 1},
        {"who": "emoe, 100%", "prompt": 90, "batch": 2},
        {"who": "emoe, 20%", "prompt": 4100, "batch": 8, "saved": 0.8},
    ]
    serving = [row(0.2, "exact", "on-demand", 10.0, 2.0), row(0.2, "exact", "emoe", 12.0, 1.6)]
    said = paper.figures({"memory": {"rows": memory}, "serving": {"rows": serving}})
    assert [good for _, good in said] == [True, True, False, False, True]
    assert [text.split(";")[0] for text, _ in said] == [
        "expert bytes in memory: -80%", "41.0 times longer prompts", "4.0 times larger batches",
        "exact at 20 %: 1.20 times the tokens/s of on demand", "exact at 20 %: -20% latency",
    ]  # fmt: skip


def test_what_was_not_measured_is_not_reached():
    memory = [{"who": "Transformers, all in memory"}, {"who": "emoe, 20%", "refusal": "killed"}]
    assert not any(good for _, good in paper.figures({"memory": {"rows": memory}}))


def test_a_child_that_is_stopped_or_fails_has_told_what_it_could_do(monkeypatch, tmp_path):
    script = tmp_path / "child.py"
    script.write_text("import json, sys, time\nprint(json.dumps({'prompt': 64}), flush=True)\nexec(sys.argv[1])\n")
    monkeypatch.setattr(paper.common, "this_script", lambda file, *words: [sys.executable, str(script), *words])
    ended = paper.ask(["pass"], None, 60.0)
    assert (ended.last("prompt"), ended.last("batch"), ended.end) == ({"prompt": 64}, {}, "")
    failed = paper.ask(["raise ValueError('too long')"], None, 60.0)
    assert (failed.last("prompt"), failed.end) == ({"prompt": 64}, "ValueError: too long")
    killed = paper.ask(["import os, signal; os.kill(os.getpid(), signal.SIGKILL)"], None, 60.0)
    assert (killed.last("prompt"), killed.end) == ({"prompt": 64}, "killed, out of memory")
