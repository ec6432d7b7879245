"""Requests with images beside requests of text: prompts with images run alone and whole, then all decode together."""

from __future__ import annotations

import families
import pytest
import torch
import transformers as tf
from engines import GREEDY, PROMPTS, Answers, alone
from seam.test_model_classes import END, IMAGE, START, _qwen3_5_moe, _qwen3_vl_moe

import emoe
from emoe.engine.engine import Engine

WRAPPERS = {
    "qwen3_vl_moe": (tf.Qwen3VLMoeForConditionalGeneration, _qwen3_vl_moe, "packed"),
    "qwen3_5_moe": (tf.Qwen3_5MoeForConditionalGeneration, _qwen3_5_moe, "forked"),
}
TEXTS = [[11 + token % 100 for token in prompt] for prompt in PROMPTS]  # none is an image


@pytest.fixture(scope="module", params=WRAPPERS)
def saved(request, tmp_path_factory):
    """(folder of a tiny checkpoint, its class, how it runs)."""
    cls, config, way = WRAPPERS[request.param]
    folder = tmp_path_factory.mktemp("images")
    torch.manual_seed(0)
    made = config()
    made.image_token_id, made.video_token_id, made.vision_start_token_id, made.vision_end_token_id = (
        IMAGE,
        8,
        START,
        END,
    )
    model = cls(made).eval()
    families.randomize(model)
    model.save_pretrained(folder)
    return folder, cls, way


def image(model, seed, grid=4):
    """A prompt with one image, as a processor gives it; of another grid, so of other positions, for another request."""
    config = model.config
    tokens = grid * grid // config.vision_config.spatial_merge_size**2
    ids = {"image": config.image_token_id, "start": config.vision_start_token_id, "end": config.vision_end_token_id}
    row = [11, 12, ids["start"], *[ids["image"]] * tokens, ids["end"], 13, 14]
    patch = 3 * config.vision_config.temporal_patch_size * config.vision_config.patch_size**2
    generator = torch.Generator().manual_seed(seed)
    return {
        "input_ids": torch.tensor([row]),
        "attention_mask": torch.ones(1, len(row), dtype=torch.long),
        "pixel_values": torch.randn(grid * grid, patch, generator=generator),
        "image_grid_thw": torch.tensor([[1, grid, grid]]),
        "mm_token_type_ids": torch.tensor([[int(token == ids["image"]) for token in row]]),
    }


def reference(model, inputs, count=6):
    model.model.rope_deltas = None
    ends, model.generation_config.eos_token_id = model.generation_config.eos_token_id, None
    out = model.generate(**inputs, max_new_tokens=count, do_sample=False, pad_token_id=0)
    model.generation_config.eos_token_id = ends
    return out[0, inputs["input_ids"].shape[1] :].tolist()


@pytest.mark.parametrize("budget", [None, 0.5])
def test_images_and_text_decode_in_one_batch_and_get_the_tokens_of_generate(saved, budget):
    folder, cls, way = saved
    plain = cls.from_pretrained(folder).eval()
    prompts = [image(plain, 1), TEXTS[0], image(plain, 2, grid=8), TEXTS[1]]
    expected = [reference(plain, each) if isinstance(each, dict) else alone(plain, each, 6) for each in prompts]
    assert reference(plain, image(plain, 3)) != expected[0], "the image makes no difference"
    model = plain if budget is None else emoe.from_pretrained(folder, memory_budget=budget)
    with Engine(model, chunk_rows=11) as engine:
        assert engine.choice.way == way
        answers = Answers(engine)
        ids = [engine.submit(prompt, max_new_tokens=6, sampling=GREEDY) for prompt in prompts]
        answers.run()
        assert [answers.error(id) for id in ids] == [None] * 4
        assert [answers.tokens(id) for id in ids] == expected
        assert engine.stats()["shared_tokens"] == 0
    if budget is not None:
        model.emoe.close(restore=False)


def test_prompts_of_the_same_tokens_and_other_images_share_nothing(saved):
    folder, cls, _ = saved
    model = cls.from_pretrained(folder).eval()
    prompts = [image(model, seed) for seed in (1, 2)]
    expected = [reference(model, each) for each in prompts]
    with Engine(model) as engine:
        answers = Answers(engine)
        for prompt, tokens in zip(prompts, expected, strict=True):
            id = engine.submit(prompt, max_new_tokens=6, sampling=GREEDY)
            answers.run()
            assert answers.tokens(id) == tokens and answers.events[id][-1].shared_tokens == 0


def test_an_image_prompt_of_a_step_that_failed_runs_again(saved):
    folder, cls, _ = saved
    model = cls.from_pretrained(folder).eval()
    prompts = [image(model, 1), TEXTS[0]]
    expected = [reference(model, prompts[0]), alone(model, prompts[1], 6)]
    with Engine(model) as engine:
        answers = Answers(engine)
        ids = [engine.submit(prompt, max_new_tokens=6, sampling=GREEDY) for prompt in prompts]
        while not all(len(answers.tokens(id)) > 1 for id in ids):
            answers.step()
        handle = model.model.language_model.layers[1].register_forward_pre_hook(lambda *_: 1 / 0)
        answers.step()
        handle.remove()
        answers.run()
        assert [answers.tokens(id) for id in ids] == expected and engine.stats()["restarts"] == 2
