"""Routing modes inside a byte budget: what the runtime loads, counts and gives back, and `emoe run --routing`."""

from __future__ import annotations

import json

import pytest
import torch

import emoe
from emoe import cli
from emoe.cli import common
from emoe.errors import ConfigError
from emoe.routing import attach


@pytest.fixture
def ids():
    return torch.randint(3, 128, (1, 20), generator=torch.Generator().manual_seed(0))


def _load(checkpoint, name="olmoe", **options):
    return emoe.from_pretrained(checkpoint(name), memory_budget=0.5, dtype=torch.float32, **options)


def _tokens(model, ids, count=12):
    return model.generate(ids, max_new_tokens=count, do_sample=False)


@pytest.mark.parametrize("name", ["olmoe", "deepseek_v3", "gpt_oss", "phimoe"])
def test_a_bias_of_zero_generates_the_bits_of_exact(name, checkpoint, ids):
    logits = []
    for options in ({}, {"routing": "biased", "bias": 0.0}):
        model = _load(checkpoint, name, **options)
        with torch.no_grad():
            logits.append([model(ids).logits, model(ids[:, :1]).logits])
        model.emoe.close(restore=False)
    assert all(torch.equal(a, b) for a, b in zip(*logits, strict=True))


def test_resident_mode_fills_the_slots_and_then_loads_nothing(checkpoint, ids):
    model = _load(checkpoint, routing="resident")
    _tokens(model, ids)
    model.emoe.check_integrity()
    first = model.emoe.stats()
    _tokens(model, ids.flip(1))
    second = model.emoe.stats()
    model.emoe.close(restore=False)
    assert first["loads"] == second["loads"] == first["slots"]
    assert second["evictions"] == 0
    assert second["routing"]["substituted"] > first["routing"]["substituted"] > 0
    assert second["routing"]["misses"] == first["routing"]["misses"]


def test_fewer_slots_than_picks_still_run(checkpoint, ids):
    model = emoe.from_pretrained(checkpoint("olmoe"), memory_budget=1e-6, dtype=torch.float32, routing="resident")
    assert max(model.emoe.plan.slots_per_layer) < model.emoe.plan.top_k
    _tokens(model, ids, 4)
    model.emoe.check_integrity()
    stats = model.emoe.stats()
    model.emoe.close(restore=False)
    assert stats["routing"]["misses"] > 0


def test_a_contract_loads_what_it_may_not_substitute(checkpoint, ids):
    free, bound = (
        _load(checkpoint, routing="resident"),
        _load(checkpoint, routing="resident", max_substituted_mass=0.02),
    )
    for model in (free, bound):
        with model.emoe.request(task="code") as request:
            _tokens(model, ids)
        model.emoe.check_integrity()
        stats = model.emoe.stats(per_layer=True)
        assert stats["routing"]["tasks"]["code"]["rows"] == request.tally.rows > 0
        assert len(stats["routing"]["layers"]) == len(stats["layers"])
        json.dumps(stats, allow_nan=False)
    assert request.tally.substituted_mass <= 0.02
    assert bound.emoe.stats()["loads"] > free.emoe.stats()["loads"]
    free.emoe.close(restore=False)
    bound.emoe.close(restore=False)


def test_a_wrapped_model_is_given_back_without_hooks(ids):
    import families

    model = families.build("qwen3_moe")
    with torch.no_grad():
        expected = model(ids).logits
    emoe.wrap(model, memory_budget=0.5, routing="resident")
    with torch.no_grad():
        assert not torch.allclose(model(ids).logits, expected)
    model.emoe.close(restore=True)
    assert not any(module._forward_hooks for module in model.modules())
    with torch.no_grad():
        assert torch.equal(model(ids).logits, expected)


def test_a_second_mode_on_a_model_that_has_one_is_refused(checkpoint):
    model = _load(checkpoint, routing="resident")
    with pytest.raises(ConfigError, match="runs with routing='resident' already"):
        attach(model, None, routing="biased", bias=0.3)
    model.emoe.close(restore=False)


def test_an_unknown_mode_is_refused_before_anything_is_loaded(tmp_path):
    with pytest.raises(ConfigError, match="exact, resident, biased"):
        emoe.from_pretrained(tmp_path / "nothing", routing="fast")
    with pytest.raises(ConfigError, match=r"bias=0\.5 goes with routing='biased'"):
        emoe.from_pretrained(tmp_path / "nothing", bias=0.5)


@pytest.mark.parametrize(
    ("option", "value"), [("--bias", "-1"), ("--max-substituted-mass", "200%"), ("--routing", "x")]
)
def test_the_command_line_refuses_what_is_no_choice(option, value, checkpoint, capsys):
    words = ["run", "--model", str(checkpoint("olmoe")), "--prompt", "x", option, value]
    assert cli.main(words) == 2
    assert f"argument {option}" in capsys.readouterr().err


def test_emoe_run_reports_what_was_substituted(checkpoint, capsys):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    folder = checkpoint("qwen3_moe")
    words = {"<pad>": 0, "<bos>": 1, "<eos>": 2} | {f"w{i}": i for i in range(3, 128)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w3"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>").save_pretrained(folder)
    words = [
        "run",
        "--model",
        str(folder),
        "--memory-budget",
        "50%",
        "--prompt",
        "w4 w9 w5 w77",
        "--max-new-tokens",
        "12",
    ]
    assert cli.main([*words, "--routing", "biased", "--bias", "0.8", "--max-substituted-mass", "30%", "--json"]) == 0
    out, err = capsys.readouterr()
    routing = json.loads(out)["stats"]["routing"]
    assert (routing["mode"], routing["max_substituted_mass"]) == ("biased", 0.3)
    assert 0 < routing["substituted_mass"] <= 0.3
    assert f"biased routing substituted {common.percent(routing['substituted_mass'])} of router mass" in err
