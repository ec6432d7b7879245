"""Policies that predict, on traces small enough to check by hand, and on public ones against stated goals."""

from __future__ import annotations

import json

import numpy as np
import pytest
from made_traces import make_trace, task_trace
from public_traces import DOMAINS, need

from emoe.cli import main
from emoe.errors import CheckpointError, ConfigError, TraceError
from emoe.predictor import UNKNOWN_TASK, top
from emoe.predictor.next_use import NextUse, followers
from emoe.predictor.table import Recent, TaskTable
from emoe.replay import Options, mix, replay, residency
from emoe.replay.predicted import POLICIES
from emoe.slots.refresh import DRIFT_SLACK, PAID, Refresh
from emoe.trace.trace import join, load_trace, save_trace


def test_prompts_of_a_batch_are_put_one_after_the_other():
    prompt = np.array([7, 7, 3, 3, 7, 3, 7, 3], dtype=np.int32)
    trace = make_trace((np.arange(8) % 8)[None, :, None], 8, prompt=prompt)
    apart = mix.into_prompts(trace)
    assert apart.prompt.tolist() == [7] * 4 + [3] * 4
    assert apart.experts.ravel().tolist() == [0, 1, 4, 6, 2, 3, 5, 7]
    assert mix.into_prompts(apart) is apart


def test_bursts_take_so_many_prompts_of_each_task_in_turn():
    task = np.repeat([0, 0, 1, 0, 1, 1, 0, 0], 2)
    prompt = np.repeat([8, 3, 5, 1, 2, 9, 4, 7], 2)
    trace = make_trace(np.arange(16)[None, :, None], 16, task=task, prompt=prompt, task_names=("code", "math"))
    burst = mix.bursts(trace, 2)
    assert burst.prompt.tolist() == np.repeat([8, 3, 5, 2, 1, 4, 9, 7], 2).tolist()
    assert burst.experts[0, :, 0].tolist() == [0, 1, 2, 3, 4, 5, 8, 9, 6, 7, 12, 13, 10, 11, 14, 15]
    assert mix.prepare([trace], burst=2)[1].prompt.tolist() == burst.prompt.tolist()


def test_prompts_are_cut_split_and_mixed_whole():
    trace = make_trace(np.arange(50)[None, :, None] % 7, 7)
    cut = mix.into_prompts(trace, 10)
    assert cut.prompt.tolist() == sorted(list(range(5)) * 10)
    assert mix.into_prompts(cut, 3) is cut  # it names its prompts
    first, rest = mix.split(cut, 0.4)
    assert (first.prompt.max(), rest.prompt.min()) == (1, 2)
    mixed = mix.mixed(cut, seed=3)
    assert mixed.prompt.tolist() != cut.prompt.tolist()
    for prompt in range(5):
        mine = np.flatnonzero(mixed.prompt == prompt)
        assert mine.tolist() == list(range(mine[0], mine[0] + 10))
        assert mixed.experts[0, mine, 0].tolist() == trace.experts[0, prompt * 10 : prompt * 10 + 10, 0].tolist()
    assert mix.mixed(cut, seed=3).prompt.tolist() == mixed.prompt.tolist()


def test_profile_and_rest_share_no_prompt():
    traces = [task_trace(1), task_trace(2)]
    profile, rest = mix.prepare(traces, profile=0.5, mix=0)
    assert profile.tokens == rest.tokens
    profile, rest = mix.prepare(traces[:1], profile=0.5, mix=0)
    assert set(profile.prompt.tolist()) == set(range(12))
    assert set(rest.prompt.tolist()) == set(range(12, 24))
    assert mix.prepare(traces, profile=0.0)[0] is None
    with pytest.raises(ConfigError, match="leaves nothing"):
        mix.prepare([task_trace(1, prompts=2)], profile=0.1)


def test_a_task_table_holds_uses_per_token_and_the_mean_for_unknown_tasks(tmp_path):
    experts = [[[0, 1], [0, 2], [3, -1]]]
    trace = make_trace(experts, 4, task=np.array([0, 0, 1], dtype=np.int32), task_names=("a", "b", "unseen"))
    table = TaskTable.profile(trace)
    assert table.of(0).tolist() == [[1, 0.5, 0.5, 0]]
    assert table.of(1).tolist() == [[0, 0, 0, 1]]
    assert table.of(2).tolist() == table.of(UNKNOWN_TASK).tolist() == [[0.5, 0.25, 0.25, 0.5]]
    table.begin(1)
    assert top(table.rank(), 1).tolist() == [[False, False, False, True]]
    table.save(tmp_path / "table.safetensors")
    again = TaskTable.load(tmp_path / "table.safetensors")
    assert again.names == table.names
    assert np.array_equal(again.frequency, table.frequency)


def test_a_file_that_is_no_task_table_is_refused(tmp_path):
    (tmp_path / "x").write_bytes(b"not one")
    with pytest.raises(CheckpointError, match="x"):
        TaskTable.load(tmp_path / "x")
    with pytest.raises(TraceError, match="without tokens"):
        TaskTable.profile(make_trace(np.zeros((1, 0, 1)), 4))


def test_recent_uses_fade_by_prompt():
    recent = Recent(1, 3, prompts=1.0)
    for pick in (0, 1):
        recent.begin(0)
        recent.observe(np.array([[[pick]]]))
    recent.observe(np.array([[[-1]]]))
    assert recent.rank().tolist() == [[pytest.approx(np.exp(-1)), 1.0, 0.0]]


def test_followers_are_what_came_after_within_a_prompt():
    prompt = np.array([0, 0, 0, 1], dtype=np.int32)
    table = followers(make_trace([[[0], [1], [0], [2]]], 3, prompt=prompt))
    everyone = np.array([0.5, 0.25, 0.25])
    assert table[0, 0] == pytest.approx((np.array([0, 1, 0]) + 20 * everyone) / 21)  # 0 -> 2 crosses prompts
    assert table[0, 1] == pytest.approx((np.array([1, 0, 0]) + 20 * everyone) / 21)


def _slow_base(trace, predictor, slots, slack, period):
    """`residency.run_base` with sets: hits and loads."""
    hits = loads = 0
    layers = range(trace.layers)
    base, inside = [set() for _ in layers], [set() for _ in layers]
    last = [dict.fromkeys(range(trace.num_experts), (0, False)) for _ in layers]
    number, chosen_for = -1, None

    def trim(layer, held):
        while len(inside[layer]) > slots:
            inside[layer].discard(min(inside[layer] - held, key=lambda expert: (*last[layer][expert], expert)))

    for token in range(trace.tokens):
        if token == 0 or trace.prompt[token] != trace.prompt[token - 1]:
            number += 1
            predictor.begin(int(trace.task[token]))
            if number % period == 0 or trace.task[token] != chosen_for:
                chosen_for = trace.task[token]
                for layer, mask in enumerate(top(predictor.rank(), slots - slack)):
                    base[layer] = set(np.flatnonzero(mask).tolist())
                    if slack:
                        continue
                    loads += len(base[layer] - inside[layer])
                    inside[layer] |= base[layer]
                    trim(layer, base[layer])
        for layer in layers:
            picks = set(trace.experts[layer, token].tolist()) - {-1}
            missed = picks - inside[layer]
            hits += len(picks) - len(missed)
            last[layer].update({expert: (token + 1, expert in missed) for expert in picks})
            if slack:
                loads += len(missed)
                inside[layer] |= missed
                trim(layer, base[layer] | picks)
        predictor.observe(trace.experts[:, token : token + 1])
    return hits, loads


@pytest.mark.parametrize("period", [1, 3])
@pytest.mark.parametrize(("slots", "slack"), [(8, 0), (8, 3), (6, 5), (6, 2)])
def test_base_and_slack_count_what_sets_count(slots, slack, period):
    trace = task_trace(3)
    table = TaskTable.profile(task_trace(4))
    counts = residency.run_base(trace, table, slots, slack, Refresh(period))
    assert (int(counts.hits.sum()), int(counts.loads.sum())) == _slow_base(trace, table, slots, slack, period)


def test_prompts_of_a_task_that_is_not_in_the_profile_are_left_to_lru():
    trace = task_trace(3)
    held_out = trace.task == 1
    (ours,) = replay(trace.take(held_out), "base+slack", [0.5], profile=trace.take(~held_out))
    (lru,) = replay(trace.take(held_out), "lru", [0.5])
    assert (ours.hits, ours.loads) == (lru.hits, lru.loads)


def test_a_fixed_period_refreshes_on_its_beat():
    refresh = Refresh(3, offset=1)
    assert [refresh.due() for _ in range(8)] == [True, True, False, False, True, False, False, True]


def test_an_adaptive_period_refreshes_when_another_base_set_would_have_served_better():
    refresh = Refresh("adaptive")
    assert (refresh.due(), refresh.due()) == (True, True)
    for _ in range(10):
        refresh.saw(0.8, 0.8 + DRIFT_SLACK)
        assert not refresh.due()
    refresh.saw(0.8, 0.85)
    assert refresh.due()
    refresh.saw(0.8, 0.8)
    assert not refresh.due()


def test_a_base_set_that_was_worth_it_is_chosen_anew_at_the_next_prompt_too():
    refresh = Refresh("adaptive")
    assert (refresh.due(), refresh.due()) == (True, True)
    refresh.saw(0.3, 0.31 + PAID)
    assert refresh.due()
    refresh.saw(0.3, 0.29 + PAID)
    assert not refresh.due()


def test_a_prompt_that_is_covered_far_worse_than_usual_calls_for_another_base_set_while_that_helps():
    refresh = Refresh("adaptive")
    assert (refresh.due(), refresh.due()) == (True, True)
    calls = 0
    for _ in range(40):  # far worse, and no base set would be any better: no drift
        refresh.saw(0.8, 0.8)
        assert not refresh.due()
        refresh.saw(0.2, 0.2)
        calls += refresh.due()
    assert 0 < calls <= 3
    for _ in range(4):  # now another would be: what a surprise is worth is learned while nothing goes by it
        refresh.saw(0.8, 0.8)
        refresh.due()
        refresh.saw(0.2, 0.2)
        refresh.due()
        refresh.saw(0.4, 0.8)
        refresh.due()
    refresh.saw(0.8, 0.8)
    refresh.due()
    refresh.saw(0.2, 0.2)
    assert refresh.due()


def test_a_rival_that_covers_more_is_followed_until_it_no_longer_does():
    refresh = Refresh("adaptive")
    beats = []
    for prompt in range(60):
        refresh.due()
        beats.append(refresh.rivals_due)
        better = 0.1 if prompt < 20 else -0.1
        refresh.saw(0.5, 0.5, 0.45, 0.5 + better)
        if prompt in (10, 50):
            assert refresh.follows == {10: 1, 50: None}[prompt]
    assert [[n for n, due in enumerate(beats) if due[rival]] for rival in range(2)] == [
        [0, 1, *range(5, 60, 5)], [0, 1, *range(10, 60, 10)],
    ]  # fmt: skip
    assert Refresh(5).rivals_due == []


def test_a_rival_that_was_not_chosen_for_a_task_chooses_when_it_comes():
    refresh = Refresh("adaptive")
    for tasks in ([0, 1], [0, 1], [0, 1]):
        refresh.due(tasks)
        refresh.saw(0.5, 0.5, 0.5, 0.5)
    for _ in range(3):
        refresh.due([1])
        refresh.saw(0.5, 0.5, 0.5, 0.5)
    assert not refresh.due([0]) and refresh.rivals_due == [True, False]  # its beat came while task 1 ran alone


def test_where_nothing_was_known_all_choose_and_none_has_a_lead():
    refresh = Refresh("adaptive")
    for _ in range(3):
        refresh.due()
        refresh.saw(0.0, 0.0, 0.0, 0.0)
    assert refresh.due(known=False) and refresh.rivals_due == [True, True]
    refresh.saw(0.0, 0.7, 0.7, 0.7)
    assert refresh.follows is None


def test_tasks_that_take_turns_by_twos_are_served_as_well_as_by_the_best_beat():
    trace = mix.bursts(task_trace(11, prompts=200, tasks=3), 2)
    ours, *fixed = (
        replay(trace, "recent", [0.3], options=Options(period=period))[0].hit_rate
        for period in ("adaptive", 1, 5, 10, 20, 40)
    )
    assert ours >= max(fixed) - 0.01


def test_an_adaptive_period_follows_a_shift_and_rests_before_it():
    trace = task_trace(5, prompts=60)
    order = np.argsort(trace.task, kind="stable")  # all of one task, then all of the other
    trace = trace.take(order)
    (adaptive,) = replay(trace, "recent", [0.5], options=Options(period="adaptive"))
    (often,) = replay(trace, "recent", [0.5], options=Options(period=1))
    (seldom,) = replay(trace, "recent", [0.5], options=Options(period=40))
    assert adaptive.refreshes < often.refreshes
    assert adaptive.hit_rate > often.hit_rate - 0.03
    assert adaptive.hit_rate > seldom.hit_rate + 0.03


def _profile_and_rest():
    return task_trace(6, prompts=60), task_trace(7, prompts=40)


def test_known_next_uses_evict_better_than_recency():
    profile, rest = _profile_and_rest()
    for ours, lru in zip(
        replay(rest, "trained-next-use", [0.3, 0.5], profile=profile), replay(rest, "lru", [0.3, 0.5]), strict=True
    ):
        assert ours.hit_rate > lru.hit_rate + 0.01
        assert ours.loads == ours.misses


def test_swaps_cover_more_than_lru_within_their_moves():
    profile, rest = _profile_and_rest()
    options = Options(miss="substitute", moves=0.3)
    (swaps,) = replay(rest, "trained-next-use", [0.5], profile=profile, options=options)
    (table,) = replay(rest, "task-table", [0.5], profile=profile)
    (lru,) = replay(rest, "lru", [0.5])
    assert swaps.hit_rate > lru.hit_rate
    assert swaps.loads < 0.5 * lru.loads
    assert swaps.loads - swaps.evictions == swaps.slots * rest.layers
    assert (swaps.miss, table.miss, lru.miss) == ("substitute", "substitute", "load")


def test_a_fit_is_repeatable_and_needs_two_prompts():
    profile, _ = _profile_and_rest()
    first, second = NextUse.fit(profile), NextUse.fit(profile)
    first.observe(profile.experts[:, :1])
    second.observe(profile.experts[:, :1])
    assert np.array_equal(first.rank(), second.rank())
    assert not np.array_equal(first.rank(), first.anew().rank())
    with pytest.raises(TraceError, match="at least two prompts"):
        NextUse.fit(make_trace(np.zeros((1, 5, 1)), 4))


@pytest.mark.parametrize(("options", "words"), [
    ({"miss": "ignore"}, "'ignore' is not one of: load, substitute"),
    ({"period": 0}, "period=0"),
    ({"period": "often"}, "nor 'adaptive'"),
    ({"slack": 1.0}, "slack=1.0"),
    ({"moves": 0}, "moves=0"),
])  # fmt: skip
def test_an_option_out_of_range_is_refused(options, words):
    with pytest.raises(ConfigError, match=words):
        Options(**options)


@pytest.mark.parametrize(("arguments", "words"), [
    ({"policy": "task-table"}, "needs a profile"),
    ({"policy": "trained-next-use", "profile": True, "per_layer": False}, "at least 2 slots in each layer"),
    ({"policy": "base+slack", "profile": True, "resident": 0.125}, "leave none for the base set"),
    (
        {"policy": "base+slack", "profile": True, "options": Options(miss="substitute")},
        "take task-table or trained-next-use",
    ),
])  # fmt: skip
def test_a_policy_that_cannot_run_says_why(arguments, words):
    trace = task_trace(8)
    policy, resident = arguments.pop("policy"), arguments.pop("resident", 0.5)
    if arguments.pop("profile", False):
        arguments["profile"] = trace
    with pytest.raises(ConfigError, match=words):
        replay(trace, policy, [resident], **arguments)


def test_the_command_learns_from_the_first_half_and_replays_the_second(tmp_path, capsys):
    path = str(save_trace(task_trace(9), tmp_path / "trace.npz"))
    policies = ["lru", *POLICIES]
    assert (
        main(["replay", "--trace", path, "--policy", ",".join(policies), "--resident", "0.5", "--mix", "--json"]) == 0
    )
    report = json.loads(capsys.readouterr().out)
    assert [result["policy"] for result in report["results"]] == policies
    assert (report["prompts"], report["tokens"]) == (12, 180)
    assert {result["picks"] for result in report["results"]} == {180 * 2 * 2}


def test_the_command_shows_what_misses_did(tmp_path, capsys):
    path = str(save_trace(task_trace(9), tmp_path / "trace.npz"))
    arguments = ["--policy", "lru,trained-next-use", "--miss", "substitute", "--period", "adaptive"]
    assert main(["replay", "--trace", path, *arguments]) == 0
    out = capsys.readouterr().out
    assert "substituted" in out
    assert "loaded" in out
    assert main(["replay", "--trace", path, "--period", "soon"]) == 2


@pytest.fixture(scope="module")
def public():
    """Profile and rest of the three domains in prompts of 100 tokens, mixed."""
    return mix.prepare([load_trace(need(f"{name}.npz")) for name in DOMAINS], profile=0.5, mix=0)


@pytest.mark.slow
def test_predicted_next_use_beats_lru_by_a_point_where_misses_are_loaded(public):
    profile, rest = public
    shares = [0.2, 0.3, 0.4]
    lru = replay(rest, "lru", shares)
    for ours, plain in zip(replay(rest, "trained-next-use", shares, profile=profile), lru, strict=True):
        assert ours.hit_rate >= plain.hit_rate + 0.01, ours.resident


@pytest.mark.slow
def test_substituting_covers_four_fifths_of_the_picks_with_a_third_of_the_loads_of_lru(public):
    profile, rest = public
    (lru,) = replay(rest, "lru", [0.3])
    (table,) = replay(rest, "task-table", [0.3], profile=profile)
    (ours,) = replay(rest, "trained-next-use", [0.3], profile=profile, options=Options(miss="substitute"))
    assert 0.76 < table.hit_rate < 0.78
    assert table.loads * 7 < lru.loads
    assert ours.hit_rate >= 0.83
    assert ours.loads <= lru.loads / 3


@pytest.mark.slow
def test_an_adaptive_period_is_near_the_best_fixed_one_and_far_better_after_a_shift():
    domains = [mix.into_prompts(load_trace(need(f"{name}.npz"))) for name in DOMAINS]

    def run(trace, period, offset=0):
        return replay(trace, "recent", [0.3], options=Options(period=period, offset=offset))[0]

    whole = join(domains)
    for trace in (*domains, *(mix.bursts(whole, size) for size in (2, 3, 5, 10)), mix.mixed(whole, 0)):
        often, *seldom = (run(trace, period) for period in (1, 5, 10, 20, 40))
        ours = run(trace, "adaptive")
        assert ours.hit_rate >= max(each.hit_rate for each in (often, *seldom)) - 0.01
        assert ours.loads < 0.97 * often.loads
    halves = [trace.take(slice(0, 4000)) for trace in domains]
    for before, after in ((0, 2), (2, 1), (1, 0)):
        both = join([halves[before], halves[after]])

        def after_shift(period, offset=0, both=both, before=before):
            whole, first = run(both, period, offset), run(halves[before], period, offset)
            return (whole.hits - first.hits) / (whole.picks - first.picks)

        # The period of 40 at whatever place of its beat the shift comes.
        assert after_shift("adaptive") >= max(after_shift(40, offset) for offset in (8, 16, 24, 32)) + 0.1
