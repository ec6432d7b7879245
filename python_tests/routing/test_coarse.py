"""Mode `coarse`: absent experts are computed with copies in few bits, inside the budget; what is read, and counted."""

from __future__ import annotations

import errno
import json
import os

import families
import pytest
import torch
from interrupts import interrupted
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

import emoe
from emoe import cli, errors, files, native, runtime
from emoe.errors import BudgetError, ConfigError, UnsupportedModelError
from emoe.model import copies, structure
from emoe.model.decode import parameter
from emoe.requests import Request
from emoe.routing import attach
from emoe.store import copies as store_copies

NAMES = ("olmoe", "mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss", "phimoe", "granitemoe")


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    """A cache folder of the test's own."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("EMOE_CACHE", str(folder))
    return folder


@pytest.fixture
def ids():
    return torch.randint(3, 128, (1, 20), generator=torch.Generator().manual_seed(0))


def _load(path, **options):
    given = {"memory_budget": 0.4, "dtype": torch.float32, "routing": "coarse", **options}
    return emoe.from_pretrained(path, **given)


@torch.no_grad()
def _steps(model, ids, steps=4):
    """Logits of a prompt and of decode along the tokens 3, 4, ..."""
    out = model(ids, use_cache=True)
    logits = [out.logits[0]]
    for token in range(3, 3 + steps):
        out = model(torch.tensor([[token]]), past_key_values=out.past_key_values, use_cache=True)
        logits.append(out.logits[0])
    return torch.cat(logits)


def _logits(model, ids):
    with torch.no_grad():
        return model(ids).logits


def _with_copies(path, residents, name):
    """Transformers' own model, in which experts that are not resident are what their copies stand for."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, experts_implementation="eager").eval()
    for (where, module), (count, resident) in zip(structure.find_experts(model), residents, strict=True):
        params = structure.param_specs(module)
        layout = copies.describe(where, module, params, name)
        for expert in sorted(set(range(count)) - set(resident)):
            values = {each.name: module.get_parameter(each.name).detach()[expert] for each in params}
            arrays = copies.encode_copy(layout, values)
            for each in {matrix.param for matrix in layout.form.matrices}:
                values[each].copy_(parameter(layout.form, each, arrays.__getitem__))
    return model


@pytest.mark.parametrize("coarse", ["int4", "q8_0"])
@pytest.mark.parametrize("name", NAMES)
def test_absent_experts_are_what_their_copies_stand_for(name, coarse, checkpoint, ids):
    model = _load(checkpoint(name), coarse=coarse, exact_mass=1)
    _logits(model, ids)  # fills the slots, which then stay
    residents = model.emoe.residents()
    assert any(len(resident) < count for count, resident in residents)
    found = _steps(model, ids)
    assert model.emoe.residents() == residents
    assert model.emoe.stats()["routing"]["coarse"] > 0
    model.emoe.check_integrity()
    model.emoe.close(restore=False)
    expected = _steps(_with_copies(checkpoint(name), residents, coarse), ids)
    assert (found - expected).abs().max() < 1e-4 * expected.abs().max()


def _of_256(folder):
    """A checkpoint whose rows are whole blocks of 256."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 256, "num_hidden_layers": 2, "num_experts_per_tok": 2, "vocab_size": 128}
    config = families._config(
        Qwen3MoeConfig, sizes, moe_intermediate_size=256, intermediate_size=256, num_experts=8, head_dim=32
    )()
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder / "plain")
    return folder / "plain"


@pytest.mark.parametrize("coarse", ["q2_k", "q3_k", "q6_k"])
def test_copies_may_lie_in_blocks_of_256_numbers(coarse, tmp_path, ids):
    path = _of_256(tmp_path)
    model = _load(path, coarse=coarse, exact_mass=1)
    _logits(model, ids)  # fills the slots, which then stay
    got = _steps(model, ids)
    want = _steps(_with_copies(path, model.emoe.residents(), coarse), ids)
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4)
    assert model.emoe.plan.coarse == coarse
    assert model.emoe.stats()["routing"]["coarse"] > 0


@pytest.mark.parametrize("coarse", ["q2_k", "q3_k"])
def test_copies_in_two_or_three_bits_of_other_rows_are_refused(coarse, checkpoint):
    with pytest.raises(UnsupportedModelError, match=f"coarse='{coarse}'.*no multiple of 256; coarse='int4' can"):
        _load(checkpoint("olmoe"), coarse=coarse)


@pytest.mark.parametrize("name", NAMES)
def test_an_exact_mass_of_zero_gives_the_bits_of_exact(name, checkpoint, ids):
    seen = []
    for options in ({"routing": "exact"}, {"exact_mass": 0}):
        model = _load(checkpoint(name), **options)
        logits = [_steps(model, ids), _logits(model, ids.flip(1).repeat(2, 1))]
        assert model.emoe.stats()["routing"].get("coarse", 0) == 0
        seen.append(logits)
        model.emoe.close(restore=False)
    for one, other in zip(*seen, strict=True):
        assert torch.equal(one, other)


def test_with_a_mass_of_one_nothing_is_read_once_slots_are_full(checkpoint, ids):
    model = _load(checkpoint("olmoe"), exact_mass=1)
    _steps(model, ids)
    first = model.emoe.stats()
    _steps(model, ids.flip(1))
    second = model.emoe.stats()
    model.emoe.close(restore=False)
    assert first["loads"] == second["loads"] == first["slots"]
    assert second["evictions"] == 0
    assert second["routing"]["coarse"] > first["routing"]["coarse"] > 0


def test_prompts_read_nothing_and_decode_reads_what_has_the_mass(checkpoint, ids):
    model = _load(checkpoint("olmoe"), exact_mass=0.3)
    _logits(model, ids)  # fills the slots
    loads = [model.emoe.stats()["loads"]]
    out = model(ids.flip(1), use_cache=True)
    loads.append(model.emoe.stats()["loads"])
    for token in range(3, 20):
        out = model(torch.tensor([[token]]), past_key_values=out.past_key_values, use_cache=True)
    loads.append(model.emoe.stats()["loads"])
    routing = model.emoe.stats()["routing"]
    model.emoe.check_integrity()
    model.emoe.close(restore=False)
    assert loads[0] == loads[1] < loads[2]
    assert routing["misses"] > 0 < routing["coarse"]
    assert routing["misses"] + routing["coarse"] == routing["absent"]
    assert 0 < routing["coarse_mass"] < 1


@pytest.mark.parametrize("named", [False, True], ids=["one request", "a request a row"])
def test_each_row_of_a_batch_that_decodes_reads_what_has_the_mass(named, checkpoint):
    ids = torch.randint(3, 128, (3, 8), generator=torch.Generator().manual_seed(1))
    model = _load(checkpoint("olmoe"), exact_mass=0.3)
    routing = model.emoe.routing
    requests = [Request(task=f"task {number}") for number in range(3)]
    with torch.no_grad():
        out = model(ids, use_cache=True)
        before = model.emoe.stats()["loads"]
        for token in range(3, 12):
            step = torch.full((3, 1), token)
            if named:
                with routing.rows([(request, 1) for request in requests]):
                    out = model(step, past_key_values=out.past_key_values, use_cache=True)
            else:
                out = model(step, past_key_values=out.past_key_values, use_cache=True)
    assert model.emoe.stats()["loads"] > before
    if named:
        assert all(request.tally.rows == 9 * 3 for request in requests)
        assert {"task 0", "task 1", "task 2"} <= model.emoe.stats()["routing"]["tasks"].keys()
    model.emoe.close(restore=False)


def test_tasks_have_masses_of_their_own_and_are_counted(checkpoint, ids):
    model = _load(checkpoint("olmoe"), exact_mass={"code": 0, "default": 1})
    _logits(model, ids)
    with model.emoe.request(task="code") as code:
        _steps(model, ids)
    with model.emoe.request(task="chat") as chat:
        _steps(model, ids)
    assert code.tally.absent == code.tally.misses > 0
    assert code.tally.coarse == 0 == code.tally.coarse_mass
    assert chat.tally.absent == chat.tally.coarse > 0 == chat.tally.misses
    stats = model.emoe.stats(per_layer=True)
    assert stats["routing"]["tasks"]["code"]["exact_mass"] == 0
    assert stats["routing"]["tasks"]["chat"]["exact_mass"] == 1
    assert sum(layer["coarse"] for layer in stats["routing"]["layers"]) == stats["routing"]["coarse"]
    assert stats["copies"]["bytes"] == model.emoe.plan.copy_bytes
    json.dumps(stats, allow_nan=False)
    model.emoe.close(restore=False)


def test_a_probe_compares_copies_with_the_full_experts(checkpoint, ids):
    model = _load(checkpoint("olmoe"), exact_mass=1, coarse="int4")
    _logits(model, ids)
    online = model.emoe.probe(share=1.0)
    with model.emoe.request(task="code"):
        model.generate(ids, max_new_tokens=6, do_sample=False)
    found = online.to_dict()["code"]
    assert model.emoe.stats()["sensitivity"]["failed"] == 0
    assert found["observed"] == 1
    assert 0 < found["substituted_mass"] < 1
    assert 0 < found["logit_change"] < 0.5
    model.emoe.close(restore=False)


def test_an_id_that_is_no_expert_adds_nothing(checkpoint):
    model = _load(checkpoint("olmoe"), exact_mass=0.5)
    layer = model.emoe.layers[0]
    hidden = torch.randn((3, families.HIDDEN), generator=torch.Generator().manual_seed(2))
    weights = torch.full((3, 2), 0.5)
    alone = layer.forward(hidden, torch.tensor([[1, -1], [2, 99], [-1, 99]]), weights)
    assert torch.equal(alone[2], torch.zeros(families.HIDDEN))
    assert alone[:2].abs().min(1).values.gt(0).any()
    model.emoe.check_integrity()
    model.emoe.close(restore=False)


def test_a_predictor_moves_experts_ahead_while_copies_stand_in(checkpoint, ids):
    model = _load(checkpoint("olmoe"), exact_mass=1, predictor="recent", period=1)
    for turn in range(4):
        with model.emoe.request():
            _steps(model, ids.roll(turn, 1))
    stats = model.emoe.stats()
    model.emoe.check_integrity()
    model.emoe.close(restore=False)
    assert stats["prediction"]["base"] > 0
    assert stats["prediction"]["loads"] > 0


# Budget


@pytest.mark.parametrize("coarse", ["int4", "int8"])
def test_copies_are_in_the_budget_and_slots_have_the_rest(coarse, checkpoint):
    path = checkpoint("olmoe")
    given = {"dtype": torch.float32, "calibrate": False}
    exact = emoe.plan(path, 0.5, **given)
    share = emoe.plan(path, 0.5, routing="coarse", coarse=coarse, **given)
    assert share.slots_per_layer == exact.slots_per_layer
    assert share.coarse == coarse
    assert share.planned_bytes == exact.planned_bytes + share.copy_bytes
    budget = exact.planned_bytes
    bound = emoe.plan(path, budget, routing="coarse", coarse=coarse, **given)
    assert budget - bound.slot_bytes < bound.planned_bytes <= budget
    assert sum(bound.slots_per_layer) < sum(exact.slots_per_layer)
    model = _load(path, memory_budget=budget, coarse=coarse)
    assert model.emoe.stats()["copies"]["bytes"] == bound.copy_bytes == model.emoe.plan.copy_bytes
    model.emoe.close(restore=False)


def test_auto_takes_the_most_bits_that_leave_slots_for_the_experts_of_a_token(checkpoint):
    path = checkpoint("olmoe")
    given = {"dtype": torch.float32, "routing": "coarse", "calibrate": False}
    share = emoe.plan(path, 0.2, **given)
    rich, poor = (emoe.plan(path, 0.2, coarse=name, **given) for name in ("q8_0", "q4_k"))
    assert share.coarse == "q4_k"
    assert rich.copy_bytes > poor.copy_bytes
    token = share.top_k * len(share.slots_per_layer) * share.slot_bytes
    fixed = share.planned_bytes - share.slab_bytes - share.copy_bytes
    found = [emoe.plan(path, fixed + token + copies.copy_bytes, **given) for copies in (rich, poor)]
    assert [plan.coarse for plan in found] == ["q8_0", "q4_k"]
    assert all(min(plan.slots_per_layer) >= plan.top_k for plan in found)
    assert emoe.plan(path, fixed + token + rich.copy_bytes - 1, **given).coarse != "q8_0"


def test_a_forecast_has_copies_in_the_place_of_reads(checkpoint, monkeypatch):
    from emoe.planning import bandwidth

    monkeypatch.setattr(bandwidth, "measure", lambda folder: bandwidth.Rates(1e9, 1e6, ""))
    exact, none, some = (
        emoe.plan(checkpoint("olmoe"), 0.3, dtype=torch.float32, **options).tokens_per_second
        for options in ({}, {"routing": "coarse"}, {"routing": "coarse", "exact_mass": {"code": 0.2}})
    )
    assert none[0] > 10 * exact[0]
    assert none[1] >= none[0]
    assert some[0] == exact[0] < some[1]


def test_a_forecast_knows_what_an_exact_mass_reads(checkpoint, monkeypatch):
    from emoe.planning import bandwidth

    monkeypatch.setattr(bandwidth, "measure", lambda folder: bandwidth.Rates(1e9, 1e6, ""))
    plans = [
        emoe.plan(checkpoint("olmoe"), 0.3, dtype=torch.float32, routing="coarse", exact_mass=mass)
        for mass in (0.1, 0.3, 0.4, 1.0)
    ]
    fastest = [plan.tokens_per_second[1] for plan in plans]  # of picks [3] one has a share of a third
    assert fastest[0] == fastest[1] < fastest[2] <= fastest[3]


def test_an_exact_mass_of_zero_takes_nothing_of_the_budget_for_copies(checkpoint):
    plans = [
        emoe.plan(checkpoint("olmoe"), 0.3, dtype=torch.float32, calibrate=False, **options)
        for options in ({}, {"routing": "coarse", "exact_mass": 0})
    ]
    assert plans[0].slots_per_layer == plans[1].slots_per_layer
    assert plans[0].planned_bytes == plans[1].planned_bytes and plans[1].coarse is None
    assert any("exact_mass=0 has every expert read" in note for note in plans[1].notes)


def test_copies_beside_slots_for_nearly_all_experts_are_said_to_cost_more_than_slots_for_all(checkpoint):
    notes = emoe.plan(
        checkpoint("olmoe"), 0.9, dtype=torch.float32, routing="coarse", coarse="q8_0", calibrate=False
    ).notes
    assert any("memory_budget=1.0 needs no copies" in note for note in notes)


def test_a_budget_that_is_too_small_names_the_copies_and_one_that_works(checkpoint):
    path = checkpoint("olmoe")
    smallest = emoe.plan(path, 0.5, dtype=torch.float32, calibrate=False).smallest_budget
    with pytest.raises(BudgetError, match="for copies of all experts") as caught:
        emoe.plan(path, smallest, dtype=torch.float32, routing="coarse", calibrate=False)
    plan = emoe.plan(path, caught.value.needed, dtype=torch.float32, routing="coarse", calibrate=False)
    assert set(plan.slots_per_layer) == {1}


def test_where_all_experts_fit_there_are_no_copies(checkpoint, ids, cache):
    exact = _load(checkpoint("olmoe"), memory_budget=1.0, routing="exact")
    model = _load(checkpoint("olmoe"), memory_budget=1.0)
    assert model.emoe.plan.coarse is None
    assert model.emoe.stats()["copies"] is None
    assert any("makes no copies" in note for note in model.emoe.plan.notes)
    assert torch.equal(_steps(model, ids), _steps(exact, ids))
    assert not list(cache.glob("copies-*"))
    model.emoe.close(restore=False)
    exact.emoe.close(restore=False)


# Files


def _no_copies(*_):
    raise AssertionError("copies were made")


def test_copies_are_made_once_and_read_after_that(checkpoint, ids, cache, monkeypatch):
    model = _load(checkpoint("olmoe"), exact_mass=1)
    expected = _steps(model, ids)
    model.emoe.close(restore=False)
    assert len(list(cache.glob("copies-q4_k-*.bin"))) == 1
    monkeypatch.setattr(store_copies, "encode_copy", _no_copies)
    model = _load(checkpoint("olmoe"), exact_mass=1)
    assert torch.equal(_steps(model, ids), expected)
    model.emoe.close(restore=False)


def _cut(data):
    return data[:-1]


def _longer_head(data):
    return b"x" + data[1:]


def _flip_last(data):
    return data[:-70] + bytes([data[-70] ^ 1]) + data[-69:]


def _flip_checksum(data):
    at = len(store_copies._MAGIC) + 40
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


@pytest.mark.parametrize("damage", [_cut, _longer_head, _flip_last, _flip_checksum, lambda data: b""])
def test_a_damaged_file_of_copies_is_made_anew(damage, checkpoint, ids, cache):
    model = _load(checkpoint("olmoe"), exact_mass=1)
    expected = _steps(model, ids)
    model.emoe.close(restore=False)
    (path,) = cache.glob("copies-*.bin")
    good = path.read_bytes()
    path.write_bytes(damage(good))
    model = _load(checkpoint("olmoe"), exact_mass=1)
    assert torch.equal(_steps(model, ids), expected)
    assert path.read_bytes() == good
    model.emoe.close(restore=False)


def test_copies_of_a_checkpoint_that_was_written_anew_are_made_anew(tmp_path, ids, cache):
    path = families.save("olmoe", tmp_path / "model")
    model = _load(path, exact_mass=1)
    _steps(model, ids)
    model.emoe.close(restore=False)
    (file,) = cache.glob("copies-*.bin")
    before = file.read_bytes()
    from safetensors.torch import load_file, save_file

    weights = path / "model.safetensors"
    tensors = {name: tensor * 1.5 if "experts" in name else tensor for name, tensor in load_file(weights).items()}
    save_file(tensors, weights, metadata={"format": "pt"})
    model = _load(path, exact_mass=1)
    model.emoe.close(restore=False)
    assert list(cache.glob("copies-*.bin")) == [file]
    assert file.read_bytes() != before


def test_copies_of_other_bytes_in_a_file_of_the_same_identity_are_made_anew(tmp_path, cache):
    folder = families.save("olmoe", tmp_path / "model")
    _load(folder).emoe.close(restore=False)
    (kept,) = cache.glob("copies-*.bin")
    before = kept.read_bytes()
    weights = folder / "model.safetensors"
    info, start = weights.stat(), 8 + int.from_bytes(weights.read_bytes()[:8], "little")
    other = families.save("olmoe", tmp_path / "other", seed=1) / "model.safetensors"
    with weights.open("r+b") as file:  # as rsync --inplace --times leaves it
        file.seek(start)
        file.write(other.read_bytes()[start:])
    os.utime(weights, ns=(info.st_atime_ns, info.st_mtime_ns))
    _load(folder).emoe.close(restore=False)
    assert kept.read_bytes() != before


def test_a_link_to_a_checkpoint_leads_to_its_copies(tmp_path, cache):
    folder = families.save("olmoe", tmp_path / "model")
    (tmp_path / "link").symlink_to(folder)
    _load(folder).emoe.close(restore=False)
    (kept,) = cache.glob("copies-*.bin")
    made = kept.stat().st_mtime_ns
    _load(tmp_path / "link").emoe.close(restore=False)
    assert list(cache.glob("copies-*.bin")) == [kept] and kept.stat().st_mtime_ns == made


def test_copies_that_cannot_be_kept_are_made_all_the_same(checkpoint, ids, cache, monkeypatch, caplog):
    model = _load(checkpoint("olmoe"), exact_mass=1)
    expected = _steps(model, ids)
    model.emoe.close(restore=False)
    (path,) = cache.glob("copies-*.bin")
    path.unlink()
    path.mkdir()  # nothing can take its place
    model = _load(checkpoint("olmoe"), exact_mass=1)
    assert "the next start makes them anew" in caplog.text
    assert torch.equal(_steps(model, ids), expected)
    model.emoe.close(restore=False)


@pytest.mark.parametrize("at", [0, 30, 60, 90, 120, 150])
def test_an_interrupt_while_copies_are_made_leaves_nothing(at, checkpoint, ids, cache):
    whole = _load(checkpoint("olmoe"), exact_mass=1)
    expected = _steps(whole, ids)
    whole.emoe.close(restore=False)
    (path,) = cache.glob("copies-*.bin")
    path.unlink()
    where = interrupted(lambda: _load(checkpoint("olmoe"), exact_mass=1), at, ("store/copies.py", "files/owned.py"))
    assert where
    files.sweep(cache)
    assert not list(cache.glob("*emoe-*"))
    model = _load(checkpoint("olmoe"), exact_mass=1)
    assert torch.equal(_steps(model, ids), expected)
    model.emoe.close(restore=False)


def test_a_number_that_is_not_finite_is_named(tmp_path):
    from safetensors.torch import load_file, save_file

    path = families.save("olmoe", tmp_path / "model")
    weights = path / "model.safetensors"
    tensors = load_file(weights)
    name = next(each for each in tensors if "experts.3" in each)
    tensors[name][0, 0] = float("nan")
    save_file(tensors, weights, metadata={"format": "pt"})
    with pytest.raises(errors.CheckpointError, match=r"expert 3 of model\.layers\.0.*not finite"):
        _load(path)


def test_a_failed_read_is_named_and_the_next_attempt_goes_on(checkpoint, ids, monkeypatch):
    module = native.load()
    monkeypatch.setattr(
        runtime,
        "make_reader",
        lambda kind: module.FaultyReader(module.make_reader(kind), fail_at=2, errno=errno.EIO),
    )
    model = _load(checkpoint("olmoe"), exact_mass=0.3)
    with pytest.raises(errors.ReadError, match=os.strerror(errno.EIO)):
        _logits(model, ids)
    model.emoe.check_integrity()
    assert torch.isfinite(_steps(model, ids)).all()
    model.emoe.check_integrity()
    model.emoe.close(restore=False)


# Ways in


def test_a_wrapped_model_has_copies_and_is_given_back(ids, cache):
    model = families.build("qwen3_moe")
    expected = _logits(model, ids)
    emoe.wrap(model, memory_budget=0.4, routing="coarse", exact_mass=1)
    changed = _logits(model, ids)
    assert 0 < (changed - expected).abs().max() < 0.2 * expected.abs().max()
    assert not list(cache.glob("copies-*"))
    model.emoe.close(restore=True)
    assert torch.equal(_logits(model, ids), expected)


def test_requests_of_an_engine_are_counted_each(checkpoint):
    model = _load(checkpoint("olmoe"), exact_mass=0.3, batch=2, context=64)
    with emoe.Engine(model) as engine:
        engine.submit(torch.arange(3, 15), max_new_tokens=6, task="code")
        engine.submit(torch.arange(20, 30), max_new_tokens=6, task="chat")
        assert list(engine.run())
    tasks = model.emoe.stats()["routing"]["tasks"]
    assert tasks["code"]["coarse"] > 0 < tasks["chat"]["coarse"]
    model.emoe.check_integrity()
    model.emoe.close(restore=False)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"routing": "coarse", "device": "cuda"}, "computes copies on the CPU"),
        ({"routing": "coarse", "kernels": "stock"}, "kernels='native'"),
        ({"routing": "coarse", "coarse": "q9"}, "int4, int8, q4_k"),
        ({"routing": "coarse", "exact_mass": 1.5}, "from 0"),
        ({"routing": "coarse", "max_substituted_mass": 0.1}, "'coarse' substitutes nothing"),
        ({"exact_mass": 0.5}, "exact_mass=0.5 goes with routing='coarse'"),
        ({"coarse": "int4"}, "coarse='int4' goes with routing='coarse'"),
    ],
)
def test_what_does_not_go_together_is_refused_before_anything_is_loaded(options, words, tmp_path):
    with pytest.raises(ConfigError, match=words):
        emoe.from_pretrained(tmp_path / "nothing", **options)


def test_copies_of_experts_that_have_few_bits_are_refused_where_nobody_asked(tmp_path):
    from emoe.convert.run import convert

    convert(families.save("olmoe", tmp_path / "plain"), tmp_path / "q4", "q4_0", progress=False)
    with pytest.raises(ConfigError, match=r"experts take few bits already.*there is no smaller copy"):
        emoe.plan(tmp_path / "q4", 0.5, routing="coarse", calibrate=False)
    with pytest.raises(ConfigError, match="they save nothing"):
        emoe.plan(tmp_path / "q4", 0.5, routing="coarse", coarse="int8", calibrate=False)


def test_copies_in_two_and_three_bits_are_offered_for_experts_of_four_with_what_they_take(tmp_path):
    from emoe.convert.run import convert

    convert(_of_256(tmp_path), tmp_path / "q4", "q4_k", progress=False)
    with pytest.raises(ConfigError, match=r"all the same: q3_k \(7\d% of them\), q2_k \(58% of them\); docs"):
        emoe.plan(tmp_path / "q4", 0.5, routing="coarse", calibrate=False)
    assert emoe.plan(tmp_path / "q4", 0.5, routing="coarse", coarse="q3_k", calibrate=False).coarse == "q3_k"


def test_layers_that_are_not_computed_natively_are_refused(checkpoint, monkeypatch):
    from emoe.model import layout

    def refused(*_):
        raise layout._NotNativeError("Its gate is another.")

    monkeypatch.setattr(layout, "_native", refused)
    with pytest.raises(UnsupportedModelError, match="Its gate is another"):
        emoe.plan(checkpoint("olmoe"), 0.5, routing="coarse", calibrate=False)


def test_a_mode_on_a_plain_model_has_no_copies():
    with pytest.raises(ConfigError, match="needs copies"):
        attach(families.build("olmoe"), None, routing="coarse")


def test_the_command_line_says_what_copies_take_and_did(model_folder, capsys):
    words = ["--model", str(model_folder), "--memory-budget", "40%", "--routing", "coarse", "--coarse", "int4"]
    assert cli.main(["plan", *words, "--no-forecast"]) == 0
    assert "of all experts, int4" in capsys.readouterr().out
    prompt = ["--prompt", "w4 w9 w5 w77", "--max-new-tokens", "12"]
    assert cli.main(["run", *words, "--exact-mass", "25%", *prompt, "--probe", "--json"]) == 0
    out, err = capsys.readouterr()
    found = json.loads(out)
    assert found["stats"]["routing"]["mode"] == "coarse"
    assert found["plan"]["coarse"] == "int4"
    assert 0 < found["probe"]["substituted_mass"] < 1
    assert "copies computed" in err
