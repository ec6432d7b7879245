"""The measures of the analysis on traces whose answer is known, the pictures, and a report of a tiny model."""

from __future__ import annotations

import json
import math
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from made_traces import cut_trace, unrelated_trace

import emoe
from emoe.analysis import correlation, figures, recording, report, run, sets, workload
from emoe.errors import TraceError
from emoe.tasks import load_prompts
from emoe.trace.trace import save_trace

SVG = "{http://www.w3.org/2000/svg}"


def test_a_layer_that_follows_from_another_correlates_fully_and_an_unrelated_one_not_at_all():
    trace = unrelated_trace()
    experts = trace.experts.copy()
    experts[1] = (experts[0] * 5 + 3) % 12  # a permutation of the ids
    found = correlation.correlate(cut_trace(experts, 12, 20))
    assert found.layers[0, 1] > 0.98 and found.layers[1, 0] > 0.98
    assert abs(found.layers[0, 2]) < 0.15 and abs(found.layers[2, 1]) < 0.15
    assert found.adjacent.tolist() == [found.layers[0, 1], found.layers[1, 2]]


def test_an_expert_that_is_always_used_is_no_correlation():
    experts = unrelated_trace().experts.copy()
    experts[:, :, 0] = 0
    experts[:, :, 1] = 1 + experts[:, :, 1] % 11
    assert abs(correlation.between_layers(cut_trace(experts, 12, 20))[0, 1]) < 0.15


def test_tokens_of_one_prompt_correlate_where_prompts_have_experts_of_their_own():
    T = 400
    prompt = np.arange(T) // 20
    experts = np.stack([(prompt * 2) % 12, (prompt * 2 + 1) % 12], axis=1)[None].repeat(3, axis=0)
    lags, elsewhere = correlation.between_tokens(cut_trace(experts, 12, 20))
    assert lags.min() == pytest.approx(1.0) and elsewhere < 0.3
    assert len(lags) == 19  # a prompt has no tokens farther apart


def test_uses_of_prompts_are_counted_per_token():
    trace = unrelated_trace(prompts=4)
    uses = correlation.prompt_uses(trace)
    assert uses.shape == (4, 3, 12)
    assert uses[2, 1, 5] == (trace.experts[1, 40:60] == 5).sum() / 20
    assert np.allclose(uses.sum(axis=2), 2)


def test_prompts_of_the_matrix_are_grouped_by_task():
    found = correlation.correlate(unrelated_trace(tasks=3))
    assert found.prompt_tasks == ("task0",) * 8 + ("task1",) * 8 + ("task2",) * 8
    assert found.prompts.shape == (24, 24) and np.allclose(np.diag(found.prompts), 1)
    assert len(found.consecutive) == 23


def test_three_prompts_are_too_few_for_correlations():
    with pytest.raises(TraceError, match="at least 4 prompts; the trace has 3"):
        correlation.correlate(unrelated_trace(prompts=3))


def test_hot_sets_of_tasks_with_experts_of_their_own_do_not_overlap():
    L, E, prompts = 2, 12, 16
    prompt = np.arange(prompts * 20) // 20
    rng = np.random.default_rng(0)
    own = rng.integers(0, 3, (L, prompts * 20, 1)) + np.where(prompt % 2 == 0, 0, 6)[None, :, None]
    found = sets.overlap(cut_trace(own, E, 20, tasks=2), 0.25)
    assert found.jaccard.round(6).tolist() == [[1.0, 0.0], [0.0, 1.0]]
    assert found.by_chance == pytest.approx(3 / 21)


def test_a_task_of_one_prompt_is_not_compared_with_itself():
    trace = unrelated_trace(prompts=3, tasks=2)
    found = sets.overlap(trace)
    assert math.isnan(found.jaccard[1, 1]) and not math.isnan(found.jaccard[0, 1])
    assert found.to_dict()["jaccard"][1][1] is None


def test_no_policy_that_loads_its_misses_beats_the_optimum():
    found = sets.hit_rates(unrelated_trace(prompts=16, tasks=2), (0.1, 0.3, 0.5, 1.0))
    assert found.shares == (0.3, 0.5)  # two slots are the picks of a token, and with all of them nothing is missed
    assert all(points >= 0 for values in found.regret().values() for points in values)
    assert set(found.loads) == {*sets.LOADING, *(f"{name} (without)" for name in sets.GOING_WITHOUT)}


def test_hit_rates_of_too_few_prompts_are_refused():
    with pytest.raises(TraceError, match="the largest task has 3"):
        sets.hit_rates(unrelated_trace(prompts=3))


def test_a_workload_has_stretches_of_one_task_and_repeats_a_prompt_only_when_its_task_has_no_other_left():
    tasks = [0] * 30 + [1] * 2
    order = workload.draw(tasks, 200, seed=1)
    assert len(order) == 200
    changes = [i for i in range(1, 200) if tasks[order[i]] != tasks[order[i - 1]]]
    stretches = np.diff([0, *changes])
    assert stretches.min() >= 8 and stretches.max() <= 24
    first = order[: changes[0]]
    assert tasks[order[0]] == 1 or len(set(first)) == len(first)


def test_base_sets_come_from_requests_before_them_alone():
    picks = [np.full((1, 5, 1), expert) for expert in range(6)]
    found = list(workload.segments(picks, [0, 1, 2, 3, 4, 5], 2, [1], 6))
    assert [np.flatnonzero(base[0]).tolist() for base, _ in found] == [[0], [2], [4]]
    assert [list(served) for _, served in found] == [[1, 2], [3, 4], [5]]


def test_coverage_and_moves_are_counted_per_request():
    picks = [np.array([[[0], [1]]]), np.array([[[0], [2]]]), np.array([[[3], [3]]])]
    found = workload.cover(picks, [0, 1, 2], 1, [2], 4)
    # {0, 1} covers half of the second request; then {0, 2} or {0, 1}, which has none of the third's.
    assert found.coverage == 0.25
    assert found.moves == 1.5 or found.moves == 1.0


@pytest.mark.parametrize("share", [1.0, 0.5])
def test_a_base_set_of_all_experts_serves_exactly_and_half_of_them_without_loading(checkpoint, share, tmp_path):
    model = emoe.from_pretrained(checkpoint("olmoe"), memory_budget=share)
    generator = torch.Generator().manual_seed(0)
    texts = [torch.randint(3, 128, (1, 12), generator=generator) for _ in range(4)]
    with model.emoe.record(tmp_path / "trace.npz") as recorder:
        losses = []
        for number, ids in enumerate(texts):
            recorder.mark(prompt=number)
            losses.append(workload.text_loss(model, ids))
        picks = workload.picks_of(recorder.trace())
    seconds = [math.inf] * 4
    steps: list[int] = []
    before = sum(len(module._forward_hooks) for module in model.modules())
    found = workload.serve(model, texts, picks, [0, 1, 2, 3, 1, 2], 2, losses, seconds, lambda: steps.append(1))
    assert len(steps) == 5 and max(seconds[1:]) < math.inf
    if share == 1.0:
        assert found.coverage == 1.0 and found.substituted_mass == 0.0
        assert found.perplexity == pytest.approx(found.exact_perplexity, rel=1e-4)
    else:
        assert 0 < found.coverage < 1 and found.substituted_mass > 0
        assert found.perplexity != found.exact_perplexity
    hooks = sum(len(module._forward_hooks) for module in model.modules())
    assert hooks == before  # the mode was taken off again
    model.emoe.check_integrity()
    model.emoe.close()


def test_pictures_are_well_formed_and_escape_their_labels():
    picture = figures.curves(
        [figures.Series("a<b", [1, 2, 3], [0.5, math.nan, 2.0]), figures.Series("c", [1, 3], [1, 1], dashed=True)],
        x_label="x & y", y_label="'y'",
    )  # fmt: skip
    tree = ElementTree.fromstring(picture)
    texts = [each.text for each in tree.iter(f"{SVG}text")]
    assert {"a<b", "c", "x & y", "'y'"} <= set(texts)
    assert len(list(tree.iter(f"{SVG}circle"))) == 4  # not the one that is no number
    heat = ElementTree.fromstring(
        figures.heat_map(
            [[0.0, 1.0], [math.nan, 0.5]], ["r", "r"], ["<c>", "d"], row_label="", column_label="", unit="u"
        )
    )
    fills = [each.get("fill") for each in heat.iter(f"{SVG}rect")][:4]
    assert fills[0] == figures.SCALE[0] and fills[1] == figures.SCALE[-1] and fills[2] == figures.MISSING


def test_pictures_of_nothing_are_pictures_too():
    ElementTree.fromstring(figures.curves([figures.Series("a", [], [])], x_label="", y_label=""))
    ElementTree.fromstring(figures.lanes([("a", [])], x_label=""))
    ElementTree.fromstring(figures.heat_map([[math.nan]], ["r"], ["c"], row_label="", column_label="", unit=""))


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]),
        (3, 3, [2.4, 2.6, 2.8, 3, 3.2, 3.4, 3.6]),
        (1, 29, [0, 5, 10, 15, 20, 25, 30]),
    ],
)
def test_ticks_are_round_and_cover_the_data(low, high, expected):
    found = figures.ticks(low, high)
    assert found[0] <= low and found[-1] >= high
    assert found == pytest.approx(expected)


def test_a_report_of_a_trace_stands_alone_and_its_figures_are_beside_it(tmp_path):
    save_trace(unrelated_trace(prompts=16, tasks=2), tmp_path / "trace.npz")
    analysis = run.of_traces([tmp_path / "trace.npz"], quick=True)
    paths = report.write(analysis, tmp_path)
    page = Path(paths["html"]).read_text()
    assert page.count("<svg") == page.count("</svg>") >= 7
    assert "src=" not in page and "href=" not in page and "@import" not in page
    values = json.loads(Path(paths["json"]).read_text())
    assert values["facts"]["tokens"] == 320
    assert [each["period"] for each in values["periods"]] == list(workload.PERIODS)
    assert values["periods"][0]["perplexity"] is None and values["timeline"] is None
    assert "Sensitivity" not in page and "Transfers against" not in page


def test_prompts_that_ship_are_of_seven_tasks_with_answers():
    prompts = load_prompts(recording.PROMPTS)
    assert len({prompt.task for prompt in prompts}) == 7
    assert all(prompt.reference for prompt in prompts)
    assert len({prompt.prompt for prompt in prompts}) == len(prompts) == 28
