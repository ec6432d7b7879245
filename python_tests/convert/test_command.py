"""`emoe convert` as a user types it."""

from __future__ import annotations

import json

import pytest
from commands import run, run_json
from test_convert import wide

from emoe import cli
from emoe.options import CONVERTED


def test_it_writes_a_checkpoint_that_plan_and_run_take_and_reports_what_it_did(model_folder, tmp_path, capsys):
    out = tmp_path / "out"
    status, text, _ = run(capsys, "convert", model_folder, out, "--experts", "q8_0")
    assert status == 0
    for words in ("routed experts", "outside experts", "100.0 %", "relative RMS", "0.5 %", "peak memory"):
        assert words in text
    name = "model.layers.*.mlp.experts.*.down_proj.weight"
    assert f"24 of {name} are int8-1x32-bfloat16: rows of 48 are no whole blocks of q8_0" in " ".join(text.split())
    status, plan = run_json(capsys, "plan", "--model", out, "--memory-budget", "50%", "--no-forecast")
    assert status == 0
    _, before = run_json(capsys, "plan", "--model", model_folder, "--memory-budget", "50%", "--no-forecast")
    assert plan["expert_bytes"] < 0.6 * before["expert_bytes"]
    status, answer = run_json(
        capsys, "run", "--model", out, "--memory-budget", "50%", "--prompt", "w5 w6 w7", "--max-new-tokens", 4,
        "--kernels", "stock",
    )  # fmt: skip
    assert status == 0 and len(answer["token_ids"]) == 4


def test_json_has_bytes_errors_and_fallbacks(model_folder, tmp_path, capsys):
    status, found = run_json(capsys, "convert", model_folder, tmp_path / "out", "--experts", "fp8")
    assert status == 0
    assert found["encodings"] == {"e4m3-128x128-float32": 72}
    assert found["fallbacks"] == [] and found["perplexity"] is None
    assert [each["path"] for each in found["layers"]] == [f"model.layers.{n}.mlp.experts" for n in range(3)]
    assert all(0.02 < each["relative_rms_error"] < 0.03 for each in found["layers"])
    assert found["bytes_after"]["all"] < found["bytes_before"]["all"]


def test_linear_layers_outside_experts_become_q8_0_where_that_is_asked_for(model_folder, tmp_path, capsys):
    words = ("convert", model_folder, tmp_path / "out", "--experts", "q8_0", "--rest", "q8_0")
    status, found = run_json(capsys, *words)
    assert status == 0 and found["rest"] == "q8_0" and found["rest_encoded"] > 0
    assert found["bytes_after"]["rest"] < found["bytes_before"]["rest"]
    assert sum(found["bytes_before"][name] for name in ("experts", "rest")) == found["bytes_before"]["all"]
    status, plan = run_json(capsys, "plan", "--model", tmp_path / "out", "--memory-budget", "50%", "--no-forecast")
    assert status == 0 and plan["decoded"] is None  # they stay so in memory
    assert plan["non_expert_bytes"] < found["bytes_before"]["rest"]


def test_perplexity_before_and_after_is_measured_on_a_text(model_folder, tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"w{3 + n * n % 120}" for n in range(600)))
    status, found = run_json(
        capsys, "convert", model_folder, tmp_path / "out", "--experts", "q8_0", "--perplexity", text
    )
    assert status == 0
    assert 50 < found["perplexity"]["before"] < 5000
    assert found["perplexity"]["after"] == pytest.approx(found["perplexity"]["before"], rel=0.02)
    record = json.loads((tmp_path / "out/emoe-convert.json").read_text())
    assert record["report"]["perplexity"] == found["perplexity"]


def test_a_text_that_cannot_be_measured_on_is_known_before_anything_is_written(model_folder, tmp_path, capsys):
    for content in (b"", b"\xff\xfe", b"w5"):
        (tmp_path / "text.txt").write_bytes(content)
        words = ("convert", model_folder, tmp_path / "out", "--experts", "q8_0", "--perplexity", tmp_path / "text.txt")
        status, _, err = run(capsys, *words)
        assert status == 2 and "text.txt" in err, content
    assert [path.name for path in tmp_path.iterdir()] == ["text.txt"]


def test_verify_says_whether_files_are_as_they_were_written(model_folder, tmp_path, capsys):
    out = tmp_path / "out"
    run(capsys, "convert", model_folder, out, "--experts", "q4_0")
    status, text, _ = run(capsys, "convert", "--verify", out)
    assert status == 0 and "files are as they were written" in text
    (out / "config.json").write_text("{}")
    status, _, err = run(capsys, "convert", "--verify", out)
    assert status == 2 and "config.json has 2 bytes" in err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "MODEL and OUT and --experts must be given"),
        (("{model}", "{out}"), "--experts must be given"),
        (("{model}", "{out}", "--experts", "iq2_xs"), "q4_k"),
        (("{model}", "{out}", "--experts", "q4_k", "--rest", "q4_0"), "keep"),
        (("{model}", "{out}", "--experts", "q4_k", "--memory", "25%"), "no number of bytes"),
        (
            ("{model}", "{out}", "--experts", "q4_k", "--memory", "much"),
            "'much' is no number of bytes",
        ),
        (("{model}", "{out}", "--experts", "q8_0", "--memory", "1M"), "1.0 MiB were given"),
        (("{model}", "{model}", "--experts", "q8_0"), "nothing is written over"),
        (("--verify", "{out}"), "no record"),
        (("{model}", "{out}", "--verify", "{out}"), "--verify OUT does not go with MODEL, OUT"),
    ],
)
def test_a_mistake_is_answered_in_one_line(words, said, model_folder, tmp_path, capsys):
    words = [word.format(model=model_folder, out=tmp_path / "out") for word in words]
    status, _, err = run(capsys, "convert", *words)
    assert status == 2
    assert said in err and len(err.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_an_interrupt_says_where_the_finished_files_are(model_folder, tmp_path, capsys, monkeypatch):
    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("emoe.convert.run._write_all", stop)
    status, _, err = run(capsys, "convert", model_folder, tmp_path / "out", "--experts", "q8_0")
    assert status == cli.EXIT_INTERRUPTED
    assert ".out.emoe-unfinished, and the same command goes on" in err


def test_help_names_every_encoding(capsys):
    with pytest.raises(SystemExit):
        cli.main(["convert", "--help"])
    out = capsys.readouterr().out
    assert all(name in out for name in CONVERTED)


def test_whole_blocks_of_256_are_q4_k(tmp_path, capsys):
    source = wide(tmp_path / "source")
    status, found = run_json(capsys, "convert", source, tmp_path / "out", "--experts", "q4_k")
    assert status == 0 and found["encodings"] == {"q4_k": 24} and not found["fallbacks"]
