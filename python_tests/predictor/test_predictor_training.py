"""Training of the sequence model, `emoe train-predictor`, and replays of the files it writes."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from made_traces import task_trace

from emoe.cli import main
from emoe.cli.train_predictor import SIZES as CLI_SIZES
from emoe.errors import ConfigError
from emoe.predictor import KINDS, load
from emoe.predictor.fitting import TRAINED
from emoe.predictor.oracle import Oracle
from emoe.predictor.report import evaluate
from emoe.predictor.table import TaskTable, count
from emoe.replay import Options, replay
from emoe.trace.trace import save_trace

CLOSED_FORM = sorted(set(KINDS) - {TRAINED})


def test_a_sequence_model_trains_the_same_twice_and_stops_early():
    from emoe.predictor.sequence import Size
    from emoe.predictor.training import train_sequence

    trace = task_trace(25, prompts=20)
    seen = []
    options = {"size": Size(8, 1, 1, 16), "width": 2, "seed": 3}
    first = train_sequence(trace, epochs=3, progress=lambda *figures: seen.append(figures), **options)
    second = train_sequence(trace, epochs=3, **options)
    assert [figures[0] for figures in seen] == [1, 2, 3]
    assert (first.epochs, first.stopped, first.loss) == (3, "epochs", second.loss)
    for predictor in (first.predictor, second.predictor):
        predictor.begin(0)
    assert np.array_equal(first.predictor.rank(), second.predictor.rank())
    early = train_sequence(trace, epochs=1000, **options)
    assert early.stopped == "early"
    assert early.best_epoch < early.epochs < 1000
    assert train_sequence(trace, minutes=1e-9, **options).stopped == "minutes"


def test_a_sequence_model_trains_on_many_tasks_with_few_prompts_each():
    from emoe.predictor.sequence import Size
    from emoe.predictor.training import train_sequence

    trace = task_trace(25, prompts=20)
    few = replace(trace, task=(trace.prompt // 2).astype(np.int32), task_names=tuple(f"task{i}" for i in range(10)))
    trained = train_sequence(few, epochs=1, size=Size(8, 1, 1, 16), width=2, seed=3)
    assert np.isfinite(trained.loss)


def test_an_untrained_sequence_model_answers_with_the_mean_of_the_profile():
    from emoe.predictor.sequence import SequenceModel, Shape, Size, build

    profile = task_trace(21)
    rates = (count(profile.experts, 16) / profile.tokens).astype(np.float32)
    shape = Shape(2, 2, 16, 4, Size(8, 1, 1, 16))
    model = SequenceModel(build(shape, rates, 0), shape, ("a", "b"))
    model.begin(1)
    assert np.allclose(model.rank(), rates / rates.sum(axis=1, keepdims=True), atol=1e-3)
    with pytest.raises(ConfigError, match="1 task names for a network of 2"):
        SequenceModel(build(shape, rates, 0), shape, ("a",))


def test_an_interrupted_training_keeps_the_best_so_far(tmp_path, capsys, monkeypatch):
    from emoe.predictor import sequence, training

    real, calls = training._epoch, []

    def interrupted(*arguments):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(training, "_epoch", interrupted)
    monkeypatch.setitem(sequence.SIZES, "small", sequence.Size(8, 1, 1, 16))
    trace, out = save_trace(task_trace(26, prompts=40), tmp_path / "trace.npz"), tmp_path / "xlnet.safetensors"
    arguments = ["--traces", str(trace), "--kind", "xlnet", "--out", str(out), "--json"]
    assert main(["train-predictor", *arguments]) == 130
    report = json.loads(capsys.readouterr().out)
    assert (report["training"]["stopped"], report["training"]["epochs"]) == ("interrupted", 3)
    assert report["evaluation"] == []
    assert load(out).names == ("task 0", "task 1")


@pytest.mark.parametrize("kind", CLOSED_FORM)
def test_the_command_writes_a_file_that_replay_takes(kind, tmp_path, capsys):
    path, out = save_trace(task_trace(27, prompts=60), tmp_path / "trace.npz"), tmp_path / "p.safetensors"
    assert main(["train-predictor", "--traces", str(path), "--kind", kind, "--out", str(out), "--mix", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["learned"]["prompts"] == report["evaluation"][0]["prompts"] == 30
    assert 0.3 < report["evaluation"][0]["recall"][1] < 1
    assert ("next_layer_recall" in report["evaluation"][0]) == (kind == "across-layers")
    policy = f"predictor:{out}"
    common = [
        "replay",
        "--trace",
        str(path),
        "--policy",
        policy,
        "--mix",
        "--profile",
        "0.5",
        "--resident",
        "0.5",
        "--json",
    ]
    for miss in ("load", "substitute"):
        assert main([*common, "--miss", miss, "--period", "2"]) == 0
        (result,) = json.loads(capsys.readouterr().out)["results"]
        assert (result["policy"], result["miss"]) == (policy, miss)
        # 30 prompts; one of another task does not wait for the period.
        assert 15 < result["refreshes"] < 30 if load(out).names else result["refreshes"] == 15


def test_the_path_of_a_predictor_that_replay_takes_may_have_commas(tmp_path, capsys):
    folder = tmp_path / "runs,1, lru x"
    folder.mkdir()
    trace, first, second = save_trace(task_trace(27), tmp_path / "trace.npz"), folder / "p", folder / "p,b"
    for path in (first, second):
        TaskTable.profile(task_trace(30)).save(path)
    common = ["replay", "--trace", str(trace), "--resident", "0.5", "--json", "--policy"]
    for policies in (["lru", f"predictor:{first}"], [f"predictor:{first}", f"predictor:{second}", "recent"]):
        assert main([*common, ",".join(policies)]) == 0
        results = json.loads(capsys.readouterr().out)["results"]
        assert [result["policy"] for result in results] == policies


def test_the_command_holds_tasks_out_and_prints_a_table(tmp_path, capsys):
    path, out = save_trace(task_trace(28, prompts=60), tmp_path / "trace.npz"), tmp_path / "p.safetensors"
    common = ["train-predictor", "--traces", str(path), "--out", str(out)]
    assert main([*common, "--kind", "across-layers", "--held-out-task", "task 1"]) == 0
    text = capsys.readouterr().out
    assert "held-out task task 1" in text
    assert "of the next layer hold" in text
    assert main([*common, "--kind", "linear", "--held-out-task", "chess"]) == 2
    assert "'chess' is not one of: task 0, task 1" in capsys.readouterr().err
    assert main([*common, "--kind", "linear", "--epochs", "3"]) == 2
    assert "are for xlnet" in capsys.readouterr().err
    assert main([*common, "--kind", "linear", "--profile", "100%"]) == 0
    assert main([*common[:-1], str(tmp_path / "no" / "p"), "--kind", "linear"]) == 2
    assert "/no' is not there" in capsys.readouterr().err


def test_the_command_and_the_library_name_the_same_sizes():
    from emoe.predictor.sequence import SIZES, parse_size

    assert tuple(SIZES) == CLI_SIZES
    with pytest.raises(ConfigError, match="not one of: small, medium, base"):
        parse_size("huge")


def test_a_replay_maps_tasks_by_name_and_refuses_other_shapes(tmp_path):
    trace = task_trace(29)
    path = tmp_path / "table.safetensors"
    TaskTable.profile(task_trace(30)).save(path)
    (same,) = replay(trace, f"predictor:{path}", [0.5], options=Options(miss="substitute"))
    swapped = replace(trace, task=1 - trace.task, task_names=("task 1", "task 0"))
    (renamed,) = replay(swapped, f"predictor:{path}", [0.5], options=Options(miss="substitute"))
    assert same.hits == renamed.hits
    stranger = replace(trace, task_names=("x", "y"))
    (unknown,) = replay(stranger, f"predictor:{path}", [0.5], options=Options(miss="substitute"))
    assert unknown.hits < same.hits
    (table,) = replay(trace, "task-table", [0.5], profile=task_trace(30))
    assert table.hits == same.hits
    with pytest.raises(ConfigError, match=r"\[layers, experts\] = \[2, 16\], the trace has \[3, 16\]"):
        replay(task_trace(1, layers=3), f"predictor:{path}", [0.5])
    with pytest.raises(ConfigError, match="predictor:PATH"):
        replay(trace, "crystal-ball", [0.5])


def test_the_oracle_bounds_every_base_set_that_a_replay_can_choose():
    trace, profile = task_trace(31), task_trace(32)
    (best,) = replay(trace, "oracle", [0.3125])
    (table,) = replay(trace, "task-table", [0.3125], profile=profile)
    assert best.hit_rate == pytest.approx(evaluate(Oracle(trace), trace, [0.3125]).recall[0])
    assert best.hits > table.hits
