"""Every predictor fits, saves, loads, starts anew, is worth more than its reverse, which is switched off."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from made_traces import make_trace, task_trace
from public_traces import DOMAINS, need

import emoe
from emoe.cli.train_predictor import KINDS as CLI_KINDS
from emoe.errors import CheckpointError, ConfigError, TraceError
from emoe.predictor import KINDS, MADE, UNKNOWN_TASK, ExpertPredictor, class_of, files, load, make, top
from emoe.predictor.across import AcrossLayers, AcrossRequests
from emoe.predictor.fitting import TRAINED, fit, of_tasks, without_tasks
from emoe.predictor.linear import LowRankLinear
from emoe.predictor.oracle import Oracle
from emoe.predictor.prompts import prompts
from emoe.predictor.report import evaluate, evaluate_next_layer
from emoe.predictor.table import Recent, TaskTable
from emoe.replay import mix
from emoe.slots.shadow import PATIENCE, Between, Switch
from emoe.trace.trace import load_trace

CLOSED_FORM = sorted(set(KINDS) - {TRAINED})
SLOTS = 5  # of 16


@pytest.fixture(scope="module")
def profile():
    return task_trace(21, prompts=60)


@pytest.fixture(scope="module")
def rest():
    return task_trace(22, prompts=60)


@pytest.fixture(scope="module")
def sequence_model(profile):
    from emoe.predictor.sequence import Size
    from emoe.predictor.training import train_sequence

    return train_sequence(profile, size=Size(16, 1, 2, 32), width=4, epochs=60, seed=1).predictor


@pytest.fixture
def predictor(request, profile, rest, sequence_model):
    kind = request.param
    if kind == TRAINED:
        return sequence_model.anew()
    if kind == "oracle":
        return Oracle(rest)
    return make("recent", layers=2, experts=16) if kind == "recent" else fit(kind, profile)


def every(kinds):
    return pytest.mark.parametrize("predictor", kinds, indirect=True)


def _ranks(predictor, trace, stop=20):
    """Scores before and within some prompts."""
    found = []
    for prompt in list(prompts(trace, predictor.names))[:stop]:
        predictor.begin(prompt.task)
        found.append(predictor.rank().copy())
        predictor.observe(prompt.picks[:, :5])
        predictor.observe(prompt.picks[:, 5:6])
        found.append(predictor.rank().copy())
    return np.array(found)


@every([*KINDS, "recent", "oracle"])
def test_a_predictor_keeps_the_protocol(predictor, rest):
    assert isinstance(predictor, ExpertPredictor)
    assert isinstance(predictor, emoe.ExpertPredictor)
    assert predictor.names in ((), rest.task_names)
    assert predictor.rank().shape == (2, 16)
    predictor.begin(UNKNOWN_TASK)
    assert np.isfinite(predictor.rank()).all()
    predictor.observe(np.full((2, 3, 2), -1))  # tokens without picks
    predictor.observe(np.zeros((2, 0, 2), dtype=np.int16))
    assert np.isfinite(predictor.rank()).all()


@every([*KINDS, "recent"])
def test_a_fresh_copy_forgets_what_was_seen_and_shares_nothing_that_changes(predictor, rest):
    first = _ranks(predictor, rest)
    fresh = predictor.anew()
    assert np.allclose(_ranks(fresh, rest), first, atol=1e-6)
    assert np.allclose(_ranks(fresh.anew(), rest), first, atol=1e-6)


@every(list(KINDS))
def test_a_predictor_is_the_same_after_saving_and_loading(predictor, rest, tmp_path):
    path = tmp_path / "p.safetensors"
    predictor.save(path)
    again = load(path)
    assert type(again) is type(predictor)
    assert again.names == predictor.names
    assert np.allclose(_ranks(again, rest), _ranks(predictor.anew(), rest), atol=1e-6)
    assert [file.name for file in tmp_path.iterdir()] == ["p.safetensors"]


@every([*KINDS, "recent"])
def test_beginning_twice_without_a_token_between_changes_nothing(predictor, rest):
    _ranks(predictor, rest, 3)
    predictor.begin(0)
    once = predictor.rank().copy()
    predictor.begin(0)
    assert np.allclose(predictor.rank(), once)


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_of_wrong_shape_or_kind_is_refused(kind, tmp_path):
    path = tmp_path / "p.safetensors"
    files.write(path, kind, {"frequency": np.zeros(3, dtype=np.float32)}, {"names": ["a"]})
    with pytest.raises(CheckpointError, match=r"p\.safetensors"):
        load(path)
    files.write(path, "crystal-ball", {}, {})
    with pytest.raises(CheckpointError, match=f"'crystal-ball', not one of: .*{kind}"):
        load(path)
    with pytest.raises(CheckpointError, match=f"expected '{kind}'"):
        class_of(kind).load(path)


def test_files_that_are_no_predictors_are_refused(tmp_path):
    from safetensors.numpy import save_file

    path = tmp_path / "p.safetensors"
    save_file({"x": np.zeros(1)}, path)
    with pytest.raises(CheckpointError, match="not the file of a predictor"):
        load(path)
    path.write_bytes(b"")
    with pytest.raises(CheckpointError, match="not the file of a predictor"):
        load(path)
    with pytest.raises(FileNotFoundError, match="no predictor"):
        load(tmp_path / "none")
    files.write(path, "linear", {}, {})
    data = path.read_bytes().replace(b'"version":"2"', b'"version":"9"')
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="version 9"):
        load(path)


def test_a_sequence_model_whose_tensors_do_not_belong_together_is_refused(sequence_model, tmp_path):
    path = tmp_path / "p.safetensors"
    sequence_model.save(path)
    tensors, settings = files.read(path, TRAINED, {})
    files.write(path, TRAINED, {**tensors, "bias": tensors["bias"][:1]}, settings)
    with pytest.raises(CheckpointError, match=r"(?s)p\.safetensors.* bias: .*\[1, 16\].*\[2, 16\]"):
        load(path)
    layers = {name.replace("layer.0", "layer.1"): tensor for name, tensor in tensors.items() if "rel_attn.q" in name}
    files.write(path, TRAINED, {**tensors, **layers}, settings)
    with pytest.raises(CheckpointError, match=r"Missing key.*model\.layer\.1\."):
        load(path)
    del tensors["places.weight"]
    files.write(path, TRAINED, tensors, settings)
    with pytest.raises(CheckpointError, match=r"places\.weight"):
        load(path)


def test_names_of_predictors_are_listed_where_one_is_unknown(profile):
    with pytest.raises(ConfigError, match="not one of: recent"):
        make("crystal-ball")
    with pytest.raises(ConfigError, match="not one of: task-table"):
        fit("crystal-ball", profile)
    with pytest.raises(ConfigError, match="minutes are for 'xlnet'"):
        fit("linear", profile, minutes=1)
    assert set(CLI_KINDS) == set(KINDS)
    assert set(MADE) == {"recent"}


class _Reversed:
    """A predictor whose scores are turned round."""

    def __init__(self, predictor):
        self.names, self._inner = predictor.names, predictor
        self.begin, self.observe = predictor.begin, predictor.observe

    def rank(self):
        return -self._inner.rank()

    def anew(self):
        return _Reversed(self._inner.anew())


def _switched_off_after(predictor, trace):
    """Requests until the switch says off, the choice being held while a request runs; None: it never does."""
    predictor, switch = predictor.anew(), Switch(loads_misses=False)
    rivals = Between([16] * 2, [SLOTS] * 2)
    for number, prompt in enumerate(prompts(trace, predictor.names), 1):
        predictor.begin(prompt.task)
        rivals.begin(top(predictor.rank(), SLOTS))
        for token in range(prompt.picks.shape[1]):
            rivals.observe(prompt.picks[:, token : token + 1])
        predictor.observe(prompt.picks)
        if switch.saw("any", *rivals.take()):
            assert "of the picks were in the base set" in switch.off("any")
            return number
    return None


@every([*KINDS, "recent", "oracle"])
def test_a_bad_predictor_is_switched_off_within_its_patience_and_a_good_one_is_not(predictor, rest):
    assert _switched_off_after(predictor, rest) is None
    assert _switched_off_after(_Reversed(predictor), rest) == PATIENCE


@every(["task-table", "linear", TRAINED])
def test_predictors_that_know_the_task_beat_one_table_for_all(predictor, profile, rest):
    (ours,) = evaluate(predictor, rest, [0.3]).recall
    (table,) = evaluate(fit("global-table", profile), rest, [0.3]).recall
    assert ours > table + 0.03


@every(["linear", "across-layers", "next-use"])
def test_what_was_seen_of_a_prompt_improves_the_rest(predictor, rest):
    report = evaluate(predictor, rest, [0.3])
    assert report.recall_seen[0] > report.recall[0] + 0.01


def test_the_oracle_is_the_upper_bound_and_calibrated(profile, rest):
    oracle = evaluate(Oracle(rest), rest)
    for kind in CLOSED_FORM:
        report = evaluate(fit(kind, profile), rest)
        assert all(a >= b for a, b in zip(oracle.recall, report.recall, strict=True)), kind
    assert oracle.calibration == pytest.approx(0)


def test_the_oracle_ends_with_its_trace():
    trace = task_trace(1, prompts=2)
    oracle = Oracle(trace)
    for prompt in prompts(trace, ()):
        oracle.begin(0)
        oracle.observe(prompt.picks)
        assert not oracle.rank().any()
    with pytest.raises(TraceError, match="no further prompt"):
        oracle.begin(0)


def test_recall_and_calibration_are_what_counting_gives():
    trace = make_trace([[[0, 1], [0, 2], [0, 1], [0, 3]]], 4)
    table = TaskTable(np.array([[[1.0, 0.5, 0.25, 0.25]]], dtype=np.float32), ("",))
    report = evaluate(table, trace, [0.25, 0.5])
    assert report.recall == (0.5, 0.75)
    assert report.recall_seen == (0.5, 2 / 3)
    assert report.calibration == pytest.approx(0)
    assert report.prompts == 1
    wrong = TaskTable(np.array([[[0.0, 0.0, 1.0, 1.0]]], dtype=np.float32), ("",))
    # Predicted uses a token 0, 0, 1, 1; observed 1, 0.5, 0.25, 0.25, of 2 in all.
    assert evaluate(wrong, trace, [0.5]).calibration == pytest.approx((1 + 0.5 + 0.75 + 0.75) / 2)


def test_evaluation_refuses_budgets_and_shapes_that_do_not_fit(rest):
    with pytest.raises(ConfigError, match=r"budget=0"):
        evaluate(Recent(2, 16), rest, [0])
    with pytest.raises(ConfigError, match=r"\[3, 16\], the trace has \[2, 16\]"):
        evaluate(Recent(3, 16), rest)
    with pytest.raises(TraceError, match="no picks"):
        evaluate(Recent(2, 16), make_trace(np.full((2, 3, 1), -1), 16))


def _chained_trace(seed):
    """Layer 1 repeats layer 0 one id further; layer 0 is random."""
    rng = np.random.default_rng(seed)
    first = np.stack([rng.choice(16, size=2, replace=False) for _ in range(300)])
    return make_trace(np.stack([first, (first + 1) % 16]), 16, prompt=np.repeat(np.arange(10), 30).astype(np.int32))


def test_across_layers_finds_what_the_layer_before_says():
    predictor = AcrossLayers.fit(_chained_trace(1))
    trace = _chained_trace(2)
    assert evaluate_next_layer(predictor, trace, [2 / 16], tokens=1) == pytest.approx(1.0)
    scores = predictor.next_layer(0, np.array([[3, -1], [3, 9]]))
    assert np.argsort(-scores)[:2].tolist() == [4, 10]
    predictor.begin(0)
    predictor.observe(np.array([[[3, 9]] * 50, [[0, 1]] * 50]))
    assert set(np.argsort(-predictor.rank()[1])[:2].tolist()) == {4, 10}
    with pytest.raises(ConfigError, match="layers 0 to 1"):
        predictor.next_layer(1, np.array([[0, 1]]))
    assert np.isfinite(predictor.next_layer(0, np.array([[-1, -1]]))).all()


def test_across_requests_learns_that_each_request_resembles_the_one_before_or_its_opposite():
    def alternating(period):
        experts = np.repeat([(0, 1) if number // period % 2 == 0 else (2, 3) for number in range(40)], 10, axis=0)
        return make_trace(experts[None], 4, prompt=np.repeat(np.arange(40), 10).astype(np.int32))

    for period, stays in ((10, True), (1, False)):
        predictor = AcrossRequests.fit(alternating(period))
        predictor.begin(0)
        predictor.observe(np.array([[[0, 1]] * 10]))
        predictor.begin(0)
        first, second = predictor.rank()[0, 0], predictor.rank()[0, 2]
        assert (first > second) == stays


@pytest.mark.parametrize("tasks", [2, 3])
def test_the_linear_predictor_adapts_to_a_task_it_never_saw(tasks):
    profile, rest = (task_trace(seed, prompts=80, tasks=tasks) for seed in (23, 24))
    shown = without_tasks(profile, ["task 0"])
    predictor = LowRankLinear.fit(shown)
    new = of_tasks(rest, ["task 0"])
    report, table = evaluate(predictor, new, [0.3]), evaluate(TaskTable.profile(shown), new, [0.3])
    assert "task 0" not in predictor.names
    assert report.recall[0] > table.recall[0] + 0.1
    assert report.recall_seen[0] > report.recall[0]


def test_blocks_of_tokens_say_what_their_tokens_say(profile):
    for kind in CLOSED_FORM:
        together, apart = fit(kind, profile), fit(kind, profile)
        for predictor in (together, apart):
            predictor.begin(0)
        together.observe(profile.experts[:, :12])
        for token in range(12):
            apart.observe(profile.experts[:, token : token + 1])
        assert np.allclose(together.rank(), apart.rank(), rtol=1e-4, atol=1e-6), kind


def test_tasks_can_be_taken_out_and_alone(profile):
    rest = without_tasks(profile, ["task 0"])
    assert rest.task_names == ("task 1",)
    assert rest.tokens + of_tasks(profile, ["task 0"]).tokens == profile.tokens
    with pytest.raises(ConfigError, match="'x' is not one of: task 0, task 1"):
        without_tasks(profile, ["x"])
    with pytest.raises(ConfigError, match="none is left"):
        without_tasks(profile, ["task 0", "task 1"])


@pytest.mark.parametrize(("make_one", "words"), [
    (lambda: LowRankLinear.fit(task_trace(1, prompts=4)), "needs 8 prompts, the profile has 4"),
    (lambda: AcrossRequests.fit(task_trace(1, prompts=2)), "needs three prompts"),
    (lambda: AcrossLayers.fit(make_trace(np.zeros((1, 5, 1)), 4)), "two layers"),
    (lambda: AcrossLayers(np.zeros((1, 3, 3)), np.zeros((2, 4))), r"expected \[1, 4, 4\]"),
    (lambda: fit("global-table", make_trace(np.zeros((1, 0, 1)), 4)), "without tokens"),
    (lambda: fit(TRAINED, task_trace(1, prompts=5)), "needs 10 prompts"),
])  # fmt: skip
def test_a_profile_that_is_too_small_is_refused(make_one, words):
    with pytest.raises(TraceError, match=words):
        make_one()


def test_neither_a_replay_nor_a_fit_in_closed_form_loads_torch():
    code = (
        "import sys; from emoe.predictor import *; import emoe.predictor.fitting, emoe.replay, emoe.predictor.report\n"
        "import emoe.predictor.linear, emoe.predictor.across, emoe.cli.train_predictor\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(emoe.__file__).parent.parent)


def test_the_linear_predictor_ranks_48_layers_of_128_experts_in_under_a_millisecond():
    trace = task_trace(33, prompts=12, prompt_tokens=20, layers=48, num_experts=128, top_k=8)
    report = evaluate(LowRankLinear.fit(trace), trace, [0.3])
    assert report.rank_ms < 1
    assert report.observe_ms < 1


@pytest.mark.slow
def test_on_public_traces_the_linear_predictor_beats_tables_and_adapts_to_a_new_task():
    profile, rest = mix.prepare([load_trace(need(f"{name}.npz")) for name in DOMAINS], profile=0.5, mix=0)
    linear = evaluate(fit("linear", profile), rest, [0.3])
    table = evaluate(fit("task-table", profile), rest, [0.3])
    assert linear.recall[0] > table.recall[0] > 0.76
    assert linear.recall_seen[0] > linear.recall[0] + 0.02
    assert linear.rank_ms < 1
    for name in DOMAINS:
        new = of_tasks(rest, [name])
        shown = without_tasks(profile, [name])
        report = evaluate(fit("linear", shown), new, [0.3])
        assert report.recall[0] > evaluate(fit("task-table", shown), new, [0.3]).recall[0] + 0.4
        assert report.recall[0] > evaluate(Recent(48, 128), new, [0.3]).recall[0] - 0.01
    across = AcrossLayers.fit(profile)
    assert evaluate_next_layer(across, rest.take(slice(0, 300)), [0.2], tokens=1).mean() > 0.87
