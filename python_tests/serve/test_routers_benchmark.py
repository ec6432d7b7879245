"""What benchmarks/routers.py sends and when it says that affinity is good enough; no server runs."""

from __future__ import annotations

import asyncio
import sys
from collections import Counter

import pytest
from benchmark_files import benchmark

from emoe.tasks import Prompt

bench = benchmark("routers")


def test_the_load_is_mixed_and_the_same_for_the_same_seed():
    prompts = [Prompt(task, f"{task} {number}") for task in ("a", "b") for number in range(5)]
    load = bench.mixed(prompts, 200, 3)
    assert load == bench.mixed(prompts, 200, 3) != bench.mixed(prompts, 200, 4)
    counts = Counter(due.task for due in load)
    assert min(counts.values()) > 70 and set(counts) == {"a", "b"}
    assert all(due.prompt.startswith(due.task) and due.told == due.task for due in load)


def test_clients_share_the_load_and_one_request_that_fails_ends_it(monkeypatch):
    dues = [bench.Due(0.0, "a", "a", str(number)) for number in range(10)]
    seen = []

    async def ask(client, due, body, clock):
        seen.append(due.prompt)
        await asyncio.sleep(0)
        return bench_answer("failed" if due.prompt == "7" and failing else "answered")

    def bench_answer(outcome):
        return type("Answer", (), {"outcome": outcome, "why": "500 internal_error"})

    monkeypatch.setattr(bench, "ask", ask)
    failing = False
    asyncio.run(bench.answered(None, dues, 3, {}))
    assert sorted(seen) == sorted(due.prompt for due in dues)
    failing = True
    with pytest.raises(bench.LoadError, match="failed 500 internal_error"):
        asyncio.run(bench.answered(None, dues, 3, {}))


@pytest.mark.parametrize(("affinity", "status"), [(0.71, 0), (0.65, 1)])
def test_affinity_is_good_enough_from_ten_points_on(monkeypatch, capsys, affinity, status):
    learned, sent = [], []

    async def hits(router, words, dues, args):
        sent.extend(due.prompt for due in dues)
        rate = affinity if router == "affinity" else 0.60
        return {"hit_rate": rate, "read_bytes_per_token": 1e6, "tokens_per_second": 1.0, "served": [{"letters": 3}]}

    monkeypatch.setattr(bench, "made_model", lambda folder: folder)
    monkeypatch.setattr(bench, "table_of", lambda model, prompts, path: learned.extend(each.prompt for each in prompts))
    monkeypatch.setattr(bench, "hits", hits)
    monkeypatch.setattr(sys, "argv", ["routers.py", "--check"])
    monkeypatch.setattr(bench.signal, "signal", lambda *_: None)
    assert bench.main() == status
    assert ("NO " if status else "yes") in capsys.readouterr().out
    assert learned and not set(learned) & set(sent)
