"""Sensitivity while serving: some requests are probed as they end, and tasks rank as an offline profile ranks them."""

from __future__ import annotations

import threading

import families
import pytest
import torch

import emoe
from emoe.errors import ClosedError, ConfigError, ReadError
from emoe.sensitivity import Prober, RequestProbes, Sample, measure
from emoe.sensitivity.online import spearman


@pytest.fixture
def model():
    built = families.build("olmoe").eval()
    yield built
    if getattr(built, "emoe", None):
        built.emoe.close()


def _ids(seed, length=12):
    return torch.randint(3, 100, (1, length), generator=torch.Generator().manual_seed(seed))


def _found(model):
    return model.emoe.stats()["sensitivity"]


@pytest.mark.parametrize(
    "options", [{}, {"use_cache": False}, {"prefill_chunk_size": 5}], ids=["cache", "no cache", "prompt in parts"]
)
@pytest.mark.parametrize("length", [12, 1])
def test_a_probe_reads_the_text_of_the_request_however_it_was_generated(model, options, length):
    emoe.wrap(model, memory_budget=0.5)
    online = model.emoe.probe(share=1.0)
    with model.emoe.request("code"):
        text = model.generate(_ids(0, length), max_new_tokens=6, min_new_tokens=6, do_sample=False, **options)
    # The last token was not read by the model.
    expected = Prober(model)(text[0, :-1], "code", prompt_tokens=length)
    assert expected.logit_change > 0
    task = online.to_dict()["code"]
    assert task["logit_change"] == pytest.approx(expected.logit_change, abs=1e-5)
    assert task["substituted_mass"] == pytest.approx(expected.substituted_mass, abs=1e-5)
    assert _found(model)["tasks"] == online.to_dict()


def test_a_text_decoded_by_hand_is_probed_as_well(model):
    emoe.wrap(model, memory_budget=0.5)
    online = model.emoe.probe(share=1.0)
    with torch.no_grad(), model.emoe.request("code"):
        model(_ids(5))  # another text in the same request: the last one counts
        cache = model(_ids(0, 5)).past_key_values
        for token in _ids(1, 3)[0]:
            model(token.reshape(1, 1), past_key_values=cache)
    expected = Prober(model)(torch.cat([_ids(0, 5), _ids(1, 3)], dim=1), "code", prompt_tokens=5)
    assert online.to_dict()["code"]["logit_change"] == pytest.approx(expected.logit_change, abs=1e-5)


def test_tokens_that_come_in_the_same_tensor_are_told_apart(model):
    emoe.wrap(model, memory_budget=0.5)
    online = model.emoe.probe(share=1.0)
    token = torch.zeros((1, 1), dtype=torch.int64)
    with torch.no_grad(), model.emoe.request("code"):
        cache = model(_ids(0, 5)).past_key_values
        for number in (7, 9, 11):
            model(token.fill_(number), past_key_values=cache)
    expected = Prober(model)([*_ids(0, 5)[0].tolist(), 7, 9, 11], "code", prompt_tokens=5)
    assert online.to_dict()["code"]["logit_change"] == pytest.approx(expected.logit_change, abs=1e-5)


def test_a_probe_changes_nothing_that_another_thread_computes(model):
    emoe.wrap(model, memory_budget=0.5)
    model.emoe.probe(share=1.0)
    at_router, answered, release, computed = (threading.Event() for _ in range(4))
    answers = []

    def answer():
        with torch.no_grad():
            answers.append(model(_ids(0)).logits)

    def before_router(module, args):
        if threading.current_thread() is other:
            at_router.set()
            assert release.wait(200)
        elif answered.is_set():  # the answer is there, so this is the probe
            release.set()
            assert computed.wait(200)

    def after_router(module, args, output):
        if threading.current_thread() is other:
            computed.set()

    answer()
    other = threading.Thread(target=answer)
    gate = model.model.layers[1].mlp.gate
    gate.register_forward_pre_hook(before_router)
    other.start()
    assert at_router.wait(200)
    with model.emoe.request("code"):
        model.generate(_ids(1), max_new_tokens=4, min_new_tokens=4, do_sample=False)
        answered.set()
        gate.register_forward_hook(after_router)
    other.join()
    assert _found(model)["probes"] == 1
    assert torch.equal(*answers)


def test_the_stated_share_of_each_tasks_requests_is_probed(model):
    emoe.wrap(model, memory_budget=0.5, routing="resident")
    assert _found(model) is None
    model.emoe.probe(share=0.5)
    for seed in range(4):
        for task in ("code", "talk", None):
            with model.emoe.request(task), torch.no_grad():
                model.generate(_ids(seed), max_new_tokens=4, min_new_tokens=4, do_sample=False)
    found = _found(model)
    assert {task: each["observed"] for task, each in found["tasks"].items()} == {"": 2, "code": 2, "talk": 2}
    assert (found["probes"], found["unusable"]) == (6, 0)
    assert found["seconds"] > 0


def test_requests_without_one_text_and_an_answer_are_counted_and_not_probed(model):
    emoe.wrap(model, memory_budget=0.5)
    model.emoe.probe(share=1.0)
    with torch.no_grad():
        with model.emoe.request("code"):
            model(_ids(0))  # nothing follows the prompt
        with model.emoe.request("code"):
            model.generate(_ids(0).repeat(2, 1), max_new_tokens=3, do_sample=False)
        with model.emoe.request("code"):
            model.generate(_ids(0), max_new_tokens=3, num_beams=2, do_sample=False)
        with model.emoe.request("code"):
            pass
        with model.emoe.request("code"):
            cache = model(_ids(0)).past_key_values
            cache.crop(-2)  # tokens were taken back, as by a draft that was not accepted
            model(_ids(1, 1), past_key_values=cache)
        with pytest.raises(RuntimeError, match="stop"), model.emoe.request("code"):
            model.generate(_ids(0), max_new_tokens=3, do_sample=False)
            raise RuntimeError("stop")
    found = _found(model)
    assert (found["probes"], found["unusable"], found["tasks"]) == (0, 5, {})


def test_requests_within_a_request_are_part_of_it(model):
    emoe.wrap(model, memory_budget=0.5)
    model.emoe.probe(share=1.0)
    with model.emoe.request("code"), model.emoe.request("talk"):
        model.generate(_ids(0), max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert list(_found(model)["tasks"]) == ["code"]


def test_in_exact_mode_probes_change_no_token_and_teach_a_predictor_nothing(model):
    answers, requests = [], []
    for probed in (False, True):
        emoe.wrap(model, memory_budget=0.5, predictor="recent")
        if probed:
            model.emoe.probe(share=1.0)
        for seed in range(3):
            with model.emoe.request():
                answers.append(model.generate(_ids(seed), max_new_tokens=6, do_sample=False).tolist())
        prediction = model.emoe.stats()["prediction"]
        requests.append((prediction["requests"], prediction["recall"]))
        model.emoe.check_integrity()
        model.emoe.close()
    assert answers[:3] == answers[3:]
    assert requests[0] == requests[1]


def test_a_closed_or_second_estimate_leaves_no_hook_behind(model):
    emoe.wrap(model, memory_budget=0.5)
    before = len(model._forward_pre_hooks)
    first = model.emoe.probe(share=1.0)
    second = model.emoe.probe(share=1.0)
    assert len(model._forward_pre_hooks) == before + 1
    with model.emoe.request("code"):
        model.generate(_ids(0), max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert (first.tasks, second.tasks) == ([], ["code"])
    with pytest.raises(ConfigError, match="share=0"):
        model.emoe.probe(share=0)
    runtime, hooks = model.emoe, model._forward_pre_hooks
    runtime.close()
    assert not any(isinstance(getattr(hook, "__self__", None), RequestProbes) for hook in hooks.values())
    with pytest.raises(ClosedError):
        runtime.probe()


def test_a_probe_that_fails_is_logged_and_leaves_the_answer(model, monkeypatch, caplog):
    emoe.wrap(model, memory_budget=0.5)
    online = model.emoe.probe(share=1.0)

    def fails(*args, **kwargs):
        raise ReadError("expert (0, 1): EIO")

    monkeypatch.setattr(model.emoe._probes, "_prober", fails)
    with model.emoe.request("code"):
        answer = model.generate(_ids(0), max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert answer.shape == (1, 16)
    stats = model.emoe.stats()["sensitivity"]
    assert (stats["probes"], stats["failed"], online.tasks) == (0, 1, [])
    assert "a probe failed: expert (0, 1): EIO" in caplog.text
    model.emoe.close()


GROUP = 25  # tokens of a task's own
SCALES = {"sure": 5.0, "steady": 3.0, "shaky": 1.8, "frail": 1.0}  # of their embeddings


def _sample(task, seed):
    first = 3 + GROUP * list(SCALES).index(task)
    ids = torch.randint(first, first + GROUP, (20,), generator=torch.Generator().manual_seed(seed)).tolist()
    return Sample(task, tuple(ids[:8]), tuple(ids[8:]))


@pytest.mark.parametrize("options", [{}, {"routing": "resident"}], ids=["exact", "resident"])
def test_tasks_rank_while_serving_as_a_profile_ranks_them(model, options):
    """Layers are normalised, so the larger an embedding the less of a token's state is what experts add to it."""
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.clone())  # else logits would grow with embeddings
    with torch.no_grad():
        for number, scale in enumerate(SCALES.values()):
            first = 3 + GROUP * number
            model.get_input_embeddings().weight[first : first + GROUP] *= scale
    profile = measure(model, [_sample(task, seed) for task in SCALES for seed in range(3)])
    assert profile.rank() == ["frail", "shaky", "steady", "sure"]

    emoe.wrap(model, memory_budget=0.5, **options)
    online = model.emoe.probe(share=1.0)
    for seed in range(100, 103):
        for task in SCALES:
            sample = _sample(task, seed)
            with torch.no_grad(), model.emoe.request(task):
                cache = model(torch.tensor([sample.input_ids])).past_key_values
                for token in sample.answer_ids:
                    model(torch.tensor([[token]]), past_key_values=cache)
    served = [online.sensitivity(task).value for task in SCALES]
    assert spearman([profile.sensitivity(task) for task in SCALES], served) >= 0.8
