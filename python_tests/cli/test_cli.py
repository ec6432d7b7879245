"""The commands as a user types them: what they print, their exit status, and what they say of a mistake."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
from commands import run, run_json
from safetensors.torch import load_file, save_file

import emoe
from emoe import cli, options
from emoe.store.headers import read_headers


@pytest.mark.parametrize("command", sorted(cli.COMMANDS))
def test_help_of_every_command_shows_examples(command, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main([command, "--help"])
    out = capsys.readouterr().out
    assert ended.value.code == 0
    assert f"emoe {command}" in out
    assert "--json" in out


def test_without_a_command_the_help_is_shown(capsys):
    status, out, _ = run(capsys)
    assert status == 0
    assert all(command in out for command in cli.COMMANDS)


def test_help_needs_neither_torch_nor_the_native_module():
    code = (
        "import sys; from emoe import cli\n"
        "try: cli.main(['run', '--help'])\n"
        "except SystemExit: pass\n"
        "print('torch' in sys.modules, 'emoe._C' in sys.modules, file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.split() == ["False", "False"]


def test_run_answers_inside_the_budget_and_says_what_it_cost(model_folder, capsys):
    status, out, err = run(
        capsys, "run", "--model", model_folder, "--memory-budget", "25%", "--prompt", "w5 w6 w7", "--max-new-tokens", 6
    )
    assert status == 0
    assert out.strip()
    assert "hit rate" in err
    assert "peak memory" in err


def test_run_gives_the_same_tokens_whatever_the_budget_and_reader(model_folder, capsys):
    words = ["run", "--model", model_folder, "--prompt", "w5 w6 w7", "--max-new-tokens", 8, "--memory-budget"]
    status, small = run_json(capsys, *words, "15%")
    assert status == 0
    _, whole = run_json(capsys, *words, "1.0", "--reader", "pread")
    assert small["token_ids"] == whole["token_ids"]
    assert small["stats"]["misses"] > whole["stats"]["misses"]
    assert small["plan"]["resident_share"] < whole["plan"]["resident_share"]


def test_run_writes_a_trace_that_replay_scores(model_folder, capsys, tmp_path):
    trace = tmp_path / "trace.npz"
    status, report = run_json(
        capsys, "run", "--model", model_folder, "--memory-budget", "50%", "--prompt", "w5 w6 w7 w8",
        "--max-new-tokens", 5, "--trace", trace,
    )  # fmt: skip
    assert status == 0
    assert report["trace"] == str(trace)
    assert emoe.load_trace(trace).experts.shape[1] >= report["prompt_tokens"]
    status, scored = run_json(capsys, "replay", "--trace", trace, "--policy", "lru", "--resident", "0.5")
    assert status == 0
    (result,) = scored["results"]
    assert result["bytes_moved"] == result["loads"] * report["stats"]["slot_bytes"]


@pytest.mark.parametrize("routing", ["resident", "exact"])
def test_run_says_how_far_substitution_moves_the_answer_and_counts_only_the_answer(model_folder, capsys, routing):
    words = ["run", "--model", model_folder, "--memory-budget", "50%", "--prompt", "w5 w6 w7", "--max-new-tokens", 6]
    words += ["--routing", routing]
    plain = run_json(capsys, *words)[1]
    assert plain["probe"] is None
    status, report = run_json(capsys, *words, "--probe", "--task", "code")
    assert status == 0
    assert report["token_ids"] == plain["token_ids"]
    # Which of them were misses depends on the order in which reads arrived.
    asked, plainly = (each["stats"]["hits"] + each["stats"]["misses"] for each in (report, plain))
    assert asked == plainly
    probe = report["probe"]
    assert (probe["task"], probe["tokens"]) == ("code", len(report["token_ids"]))
    assert 0 < probe["substituted_mass"] < 1
    assert 0 < probe["logit_change"] < 1
    assert "of router mass moves next tokens by" in run(capsys, *words, "--probe")[2]


def test_run_keeps_the_experts_that_a_predictor_names_for_the_task(model_folder, capsys, tmp_path):
    from emoe.predictor.table import TaskTable

    layers, experts = len(emoe.plan(model_folder, 0.75).slots_per_layer), 8
    table = tmp_path / "table.safetensors"
    frequency = np.zeros((2, layers, experts), dtype=np.float32)
    frequency[0, :, 1] = frequency[1, :, 2] = 1.0
    TaskTable(frequency, ("code", "talk")).save(table)
    words = ("run", "--model", model_folder, "--memory-budget", "75%", "--prompt", "w4 w5 w6", "--max-new-tokens", 4)
    plain = run_json(capsys, *words)[1]
    status, report = run_json(capsys, *words, "--predictor", table, "--task", "talk", "--prefetch", "look-ahead")
    assert status == 0
    assert report["token_ids"] == plain["token_ids"]
    assert report["task"] == "talk"
    assert report["stats"]["prediction"]["predictor"] == "TaskTable"
    assert "talk" in report["stats"]["prediction"]["tasks"]
    assert "TaskTable" in run(capsys, *words, "--predictor", table)[2]


def test_run_refuses_a_predictor_that_is_neither_a_file_nor_a_name(model_folder, capsys):
    words = ("run", "--model", model_folder, "--memory-budget", "50%", "--prompt", "w4", "--predictor", "psychic")
    status, _, err = run(capsys, *words)
    assert status == 2
    assert "psychic" in err and "recent" in err


def test_run_takes_every_option_that_from_pretrained_takes(model_folder, capsys, monkeypatch):
    given = {
        "memory_budget": ("75%", 0.75), "dtype": ("bfloat16", "bfloat16"), "context": ("64", 64), "batch": ("2", 2),
        "prefill_chunk": ("16", 16), "kernels": ("stock", "stock"), "dense": ("torch", "torch"),
        "attention": ("torch", "torch"), "norms": ("torch", "torch"), "dense_encoding": ("keep", "keep"),
        "routing": ("biased", "biased"),
        "bias": ("code=0.5,default=inf", {"code": 0.5, "default": float("inf")}), "max_substituted_mass": ("2%", 0.02),
        "top_pick": ("replace", "replace"), "coarse": ("auto", "auto"), "exact_mass": (None, None),
        "policy": ("lfu", "lfu"), "predictor": ("recent", "recent"), "period": ("adaptive", "adaptive"),
        "slack": ("0.25", 0.25), "prefetch": ("look-ahead", "look-ahead"), "sensitivity": (None, None),
        "reader": ("pread", "pread"), "device": ("cpu", "cpu"), "pinned_memory": ("1G", "1G"), "miss": ("cpu", "cpu"),
    }  # fmt: skip
    assert list(given) == list(options.rows("load"))
    seen = []
    real = emoe.from_pretrained
    monkeypatch.setattr(emoe, "from_pretrained", lambda path, **kwargs: seen.append(kwargs) or real(path, **kwargs))
    words = [part for name, (text, _) in given.items() if text for part in ("--" + name.replace("_", "-"), text)]
    status, report = run_json(
        capsys, "run", "--model", model_folder, "--prompt", "w5", "--max-new-tokens", 2, "--task", "code", *words
    )
    assert status == 0
    assert seen == [{name: value for name, (_, value) in given.items()} | {"trust_remote_code": False}]
    assert report["stats"]["reader"] == "pread"
    assert (report["plan"]["batch"], report["plan"]["context"], report["plan"]["dtype"]) == (2, 64, "bfloat16")


def test_defaults_of_the_command_line_are_those_of_the_table(model_folder, capsys, monkeypatch):
    seen = []
    real = emoe.from_pretrained
    monkeypatch.setattr(emoe, "from_pretrained", lambda path, **kwargs: seen.append(kwargs) or real(path, **kwargs))
    assert run(capsys, "run", "--model", model_folder, "--prompt", "w5", "--max-new-tokens", 2)[0] == 0
    assert seen == [
        {name: each.default for name, (each, _) in options.rows("load").items()} | {"trust_remote_code": False}
    ]


@pytest.mark.parametrize("name", list(options.rows("load")))
def test_every_option_is_refused_by_the_command_line_as_by_the_api(name, capsys):
    status, out, err = run(capsys, "run", "--model", "a/b", "--prompt", "x", "--" + name.replace("_", "-"), "?")
    assert (status, out) == (2, "")
    assert f"{name}='?' is " in err
    assert len(err.splitlines()) == 1


def test_run_reads_the_prompt_from_a_file_or_standard_input(model_folder, capsys, tmp_path, monkeypatch):
    import io

    file = tmp_path / "prompt.txt"
    file.write_text("w9 w10")
    words = ["run", "--model", model_folder, "--memory-budget", "50%", "--max-new-tokens", 3]
    _, from_file = run_json(capsys, *words, "--prompt-file", file)
    monkeypatch.setattr(sys, "stdin", io.StringIO("w9 w10"))
    _, from_stdin = run_json(capsys, *words, "--prompt", "-")
    read, write = os.pipe()  # what a shell makes of <(...)
    os.write(write, b"w9 w10\n")
    os.close(write)
    _, from_pipe = run_json(capsys, *words, "--prompt-file", f"/dev/fd/{read}")
    os.close(read)
    assert from_file["token_ids"] == from_stdin["token_ids"] == from_pipe["token_ids"]


def test_plan_shows_bytes_and_refuses_with_the_smallest_budget(model_folder, capsys):
    status, plan = run_json(capsys, "plan", "--model", model_folder, "--memory-budget", "50%", "--no-forecast")
    assert status == 0
    assert plan["resident_share"] == 0.5
    status, refusal = run_json(capsys, "plan", "--model", model_folder, "--memory-budget", "1MiB", "--no-forecast")
    assert status == 2
    assert refusal["kind"] == "BudgetError"
    assert refusal["needed"] == plan["smallest_budget"]
    status, out, _ = run(capsys, "plan", "--model", model_folder, "--memory-budget", refusal["needed"])
    assert status == 0
    assert "smallest budget" in out


@pytest.fixture(scope="module")
def quantized_folder(model_folder, tmp_path_factory):
    """The model with experts of FP8 in its first layer, and linear layers in it everywhere."""
    import quantized

    folder = tmp_path_factory.mktemp("quantized") / "model"
    shutil.copytree(model_folder, folder)
    encode = quantized.byte("_scale_inv", 16, 16)
    tensors = {}
    for file in folder.glob("*.safetensors"):
        for name, weight in load_file(file).items():
            its = re.search(r"layers\.0\..*experts|self_attn\.\w_proj", name) and weight.dim() == 2
            parts = encode(weight.float())[0] if its else {"": weight}
            tensors |= {name + end: part.contiguous() for end, part in parts.items()}
        file.unlink()
    (folder / "model.safetensors.index.json").unlink(missing_ok=True)
    save_file(tensors, folder / "model.safetensors")
    return folder


def test_plan_says_how_experts_are_stored_and_what_is_decoded(quantized_folder, capsys):
    words = ["plan", "--model", quantized_folder, "--memory-budget", "50%", "--no-forecast", "--dense", "torch"]
    status, plan = run_json(capsys, *words)
    assert status == 0
    assert plan["source"] == "headers"
    assert plan["checkpoint_bytes"] == sum(
        entry.nbytes for entry in read_headers(quantized_folder.glob("*.s*")).values()
    )
    assert plan["experts"][0]["layers"] == [0] and plan["experts"][0]["encodings"]["up"] == "e4m3-16x16-float32"
    assert plan["decoded"]["bytes"] > plan["decoded"]["stored_bytes"] == plan["encoded_bytes"] > 0
    text = " ".join(run(capsys, *words)[1].split())
    for said in ("checkpoint", "headers of its files", "e4m3-16x16-float32 in 1 of", "are decoded to"):
        assert said in text


def test_plan_of_a_config_alone_says_so(quantized_folder, tmp_path, capsys):
    config = json.loads((quantized_folder / "config.json").read_text())
    said = {"quant_method": "fp8", "weight_block_size": [16, 16]}
    (tmp_path / "config.json").write_text(json.dumps({**config, "quantization_config": said}))
    status, out, _ = run(capsys, "plan", "--model", tmp_path, "--memory-budget", "50%", "--no-forecast")
    assert status == 0
    assert "no weights are here" in " ".join(out.split()) and "there are no weights here" in " ".join(out.split())
    (tmp_path / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "hqq"}}))
    status, refusal = run_json(capsys, "plan", "--model", tmp_path, "--memory-budget", "50%")
    assert status == 2 and refusal["kind"] == "UnsupportedModelError" and "hqq" in refusal["error"]


def test_run_says_what_was_read_in_place_and_what_was_decoded(quantized_folder, capsys):
    words = ["run", "--model", quantized_folder, "--memory-budget", "50%", "--prompt", "w5 w6", "--max-new-tokens", 2]
    words += ["--kernels", "stock"]
    status, report = run_json(capsys, *words)
    assert status == 0
    first, *others = report["stats"]["experts"]
    assert first["layers"] == [0] and first["read"] == "in place" and first["kernels"] == "stock"
    assert set(first["encodings"].values()) == {"e4m3-16x16-float32"} and others
    assert report["stats"]["decoded"] == report["plan"]["decoded"]
    said = run(capsys, *words)[2]
    assert "experts read in place: e4m3-16x16-float32 by stock kernels" in said and "outside them decoded to" in said


def test_run_says_nothing_of_encodings_where_there_are_none(model_folder, capsys):
    words = ["run", "--model", model_folder, "--memory-budget", "50%", "--prompt", "w5 w6", "--max-new-tokens", 2]
    assert "in place" not in run(capsys, *words, "--dtype", "float16")[2]
    status, report = run_json(capsys, *words, "--dtype", "float16")
    assert status == 0
    assert {row["read"] for row in report["stats"]["experts"]} == {"converted from float32"}
    assert report["stats"]["decoded"] is None


def test_doctor_says_which_encodings_the_kernels_serve(capsys):
    status, found = run_json(capsys, "doctor")
    assert status == 0
    served = found["native"]["encodings"]
    assert {"float32", "float16", "bfloat16"} <= set(served["native"])
    assert not set(served["native"]) & set(served["stock"])
    assert {"mxfp4", "q4_k", "e4m3-128x128-float32", "int4-32-bfloat16"} <= {*served["native"], *served["stock"]}
    assert "encodings" in run(capsys, "doctor")[1]


def test_doctor_says_what_was_built_and_why_there_is_no_cuda(capsys):
    status, found = run_json(capsys, "doctor")
    assert status == 0
    assert found["missing"] == []
    assert found["native"]["isa"] in found["native"]["available_isas"]
    assert {"pread", "uring"} <= found["native"]["readers"].keys()
    assert found["native"]["cuda"]
    status, out, _ = run(capsys, "doctor")
    assert status == 0
    assert "instruction set" in out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["fly"], "run"),
        (["run", "--model", "/nowhere/at/all", "--prompt", "hi"], "/nowhere/at/all"),
        (["run", "--prompt", "hi"], "--model"),
        (["plan", "--model", ".", "--memory-budget", "much"], "config.json"),
        (["plan", "--model", "a/b", "--memory-budget", "much"], "GiB"),
        (["plan", "--model", "a/b", "--memory-budget", "-3"], "memory-budget"),
        (["plan", "--model", "a/b", "--dtype", "int3"], "bfloat16"),
        (["run", "--model", "a/b", "--prompt", "x", "--max-new-tokens", "0"], "at least 1"),
        (["run", "--model", "a/b", "--prompt", " "], "empty"),
        (["replay", "--trace", "/nowhere.npz"], "nowhere.npz"),
    ],
)
def test_a_mistake_gives_one_line_that_names_it_and_status_2(words, said, capsys):
    status, _, err = run(capsys, *words)
    assert status == 2
    assert said in err
    assert "Traceback" not in err
    assert len(err.strip().splitlines()) == 1


OUTPUTS = [
    (["analyze", "--out"], "analyze"),
    (["profile", "tasks", "--prompts", "p", "--out"], ""),
    (["profile", "sensitivity", "--prompts", "p", "--model", "a/b", "--out"], ""),
    (["train-predictor", "--traces", "t", "--kind", "linear", "--out"], ""),
    (["run", "--model", "a/b", "--prompt", "x", "--trace"], ""),
]


@pytest.mark.parametrize(("words", "makes_folders"), OUTPUTS, ids=[" ".join(words[:2]) for words, _ in OUTPUTS])
def test_a_place_that_cannot_be_written_is_named_before_anything_runs(words, makes_folders, tmp_path, capsys):
    file = tmp_path / "file.npz"
    file.write_bytes(b"")
    places = {
        file / "in.npz": "file.npz' is",  # a file where a folder is wanted
        "/proc/new.npz": "cannot be written: ",
        **({file: "is a file; give a folder"} if makes_folders else {
            tmp_path: "does not end in .npz" if words[0] == "run" else "is a folder; give a file",
            tmp_path / "no" / "in.npz": "/no' is not there",
        }),
    }  # fmt: skip
    for place, said in places.items():
        status, out, err = run(capsys, *words, place)
        assert (status, out) == (2, "")
        assert said in err
        assert words[-1] in err
        assert len(err.splitlines()) == 1
    assert list(tmp_path.iterdir()) == [file]


def test_a_missing_tokenizer_is_named(checkpoint, capsys):
    status, _, err = run(capsys, "run", "--model", checkpoint("mixtral"), "--prompt", "hi")
    assert status == 2
    assert "tokenizer" in err


def test_an_unknown_instruction_set_is_refused_with_the_choices(capsys):
    done = subprocess.run(
        [sys.executable, "-m", "emoe", "doctor", "--json"],
        capture_output=True,
        text=True,
        env={**__import__("os").environ, "EMOE_FORCE_ISA": "mmx"},
    )
    assert done.returncode == 1
    assert "scalar" in json.loads(done.stdout)["missing"][0]
