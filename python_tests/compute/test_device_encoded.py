"""Quantized checkpoints on the emulated device: the tokens and numbers of the CPU path, whatever the budget."""

from __future__ import annotations

import pytest
import quantized
import torch
from quantized import FORMATS, Format, byte, fp8

import emoe
from emoe.errors import UnsupportedModelError

# Every kind of codes, and every kind of scale of FP8.
NAMES = (
    "fp8 blocks", "mxfp8", "fp8 e5m2", "fp8 channel", "fp8 fused one scale", "int8", "gpt-oss", "deepseek-v4", "nvfp4",
    "nvfp4 compressed", "int4", "int4 zeros", "int4 rows", "int8 words", "awq", "gptq", "gptq v2", "q8_0", "q4_0",
    "gguf_mxfp4", "q4_k",
)  # fmt: skip


@pytest.fixture(params=["emulated", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request, found_device):
    """Names of devices; on a machine with a GPU the same tests run there."""
    return found_device(request.param)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """written(name, format) -> folder of the checkpoint, written on first use."""
    root = tmp_path_factory.mktemp("encoded")

    def get(name, form=None):
        folder = root / name
        if not folder.exists():
            quantized.write(folder, form or FORMATS[name])
        return folder / "quantized"

    return get


def ids(length):
    return torch.randint(3, 100, (1, length), generator=torch.Generator().manual_seed(3))


def run(folder, where, budget, length=12, dtype=torch.float32):
    """Logits of a prompt and the tokens after it."""
    model = emoe.from_pretrained(folder, memory_budget=budget, device=where, dtype=dtype)
    prompt = ids(length).to(model.device)
    with torch.no_grad():
        logits = model(prompt).logits.float().cpu()
    tokens = model.generate(prompt, max_new_tokens=4, do_sample=False, pad_token_id=0)[0].tolist()
    kernels = model.emoe.stats()["kernels"]
    assert kernels == {("native" if where == "cpu" else model.emoe.stats()["device"]): len(model.emoe.layers)}
    model.emoe.check_integrity()
    model.emoe.close(restore=False)
    return logits, tokens


@pytest.mark.parametrize("name", NAMES)
def test_every_encoding_gives_the_tokens_of_the_cpu_with_one_slot_half_and_all(device, written, name):
    folder = written(name)
    wanted, tokens = run(folder, "cpu", 1.0)
    results = [run(folder, device, budget) for budget in (1e-9, 0.5, 1.0)]
    torch.testing.assert_close(results[0][0], wanted, rtol=1e-4, atol=1e-5 * float(wanted.abs().max()))
    for logits, its_tokens in results:
        assert its_tokens == tokens
        assert torch.equal(logits, results[0][0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["fp8 blocks", "gpt-oss", "int4 zeros", "awq", "gptq", "q8_0", "q4_k"])
def test_long_prompts_in_16_bits_are_near_the_exact_numbers_on_tensor_cores(device, written, name, dtype):
    folder = written(name)
    exact, _ = run(folder, "cpu", 1.0, length=40)
    on_cpu, _ = run(folder, "cpu", 1.0, length=40, dtype=dtype)
    logits, _ = run(folder, device, 0.5, length=40, dtype=dtype)
    error = [float((each - exact).norm() / exact.norm()) for each in (on_cpu, logits)]
    assert error[1] < 2 * error[0] + 1e-3


@pytest.mark.parametrize("miss", ["cpu", "auto"])
def test_misses_of_encoded_experts_may_be_left_to_the_cpu(device, written, miss):
    folder = written("q8_0")
    _, tokens = run(folder, "cpu", 1.0)
    model = emoe.from_pretrained(folder, memory_budget=0.5, device=device, dtype=torch.float32, miss=miss)
    found = model.generate(ids(12).to(model.device), max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert found[0].tolist() == tokens
    model.emoe.close(restore=False)


def test_settled_layers_of_encoded_experts_need_no_host(device, written):
    results = []
    for where in ("cpu", device):
        model = emoe.from_pretrained(
            written("int4"), memory_budget=0.5, routing="resident", device=where, dtype=torch.float32
        )
        results += [model.generate(ids(5).to(model.device), max_new_tokens=6, do_sample=False, pad_token_id=0).cpu()]
        stats = model.emoe.stats()
        model.emoe.close(restore=False)
    assert torch.equal(results[0], results[1])
    assert stats["settled"] > 0


def test_what_the_kernels_do_not_take_is_refused_by_layer_and_encoding_with_what_to_do(device, written):
    with pytest.raises(UnsupportedModelError, match=r"layers\.0.*act order.*device='cpu'"):
        emoe.from_pretrained(written("gptq order"), memory_budget=0.5, device=device)
    odd = Format(byte("_scale_inv", 1, 20), "e4m3-1x20-float32", fp8(1, 20))
    with pytest.raises(UnsupportedModelError, match=r"its gate is e4m3 with groups .* 20; .* multiples of 8.*'cpu'"):
        emoe.from_pretrained(written("odd", odd), memory_budget=0.5, device=device)
