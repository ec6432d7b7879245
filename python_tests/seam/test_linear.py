"""Weights outside experts that stay encoded: right numbers for whoever uses them, and no second copy in memory."""

from __future__ import annotations

import copy
import io
import pickle
import re

import families
import pytest
import quantized
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from quantized import FORMATS, Format, blocks, byte
from torch import nn
from transformers import AutoModelForCausalLM

import emoe
from emoe.errors import ConfigError, EmoeError, ExpertsElsewhereError, SaveError
from emoe.model.dense import kept, layers
from emoe.model.encoding import encoding
from emoe.model.held import Held
from emoe.seam.linear import EncodedTensor, decode_and_multiply, encoded_weights, held_bytes

# PEFT asks Transformers for a name it will drop.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

Q8 = quantized.blocks("q8_0")


def _ids(rows: int = 2, length: int = 12) -> torch.Tensor:
    return torch.randint(3, 100, (rows, length), generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """written(name of a format) -> folder with `quantized` and `plain`, written on first use."""
    root = tmp_path_factory.mktemp("dense")

    def get(name: str):
        folder = root / name.replace("/", "-")
        if not folder.exists():
            quantized.write(folder, FORMATS[name])
        return folder

    return get


def _load(folder, dtype=torch.float32, **options):
    options = {"kernels": "stock", "dense": "native", "memory_budget": 0.5} | options
    return emoe.from_pretrained(folder / "quantized", dtype=dtype, **options)


def _truth(folder):
    return AutoModelForCausalLM.from_pretrained(folder / "plain", dtype=torch.float32).eval()


@torch.no_grad()
def _logits(model) -> torch.Tensor:
    return model(_ids()).logits


def _assert_close(logits, truth, most=1e-5) -> None:
    assert ((logits - truth).norm() / truth.norm()).item() <= most


def _weight(held_as: str = "q8_0", rows: int = 64, cols: int = 96, dtype=torch.float32):
    """(an encoded weight, its numbers)."""
    parts, numbers = blocks(held_as)(torch.randn(rows, cols, generator=torch.Generator().manual_seed(1)))
    held = Held(encoding(held_as), rows, cols)
    held.raw("blocks").copy_(next(iter(parts.values())).view(-1))
    return EncodedTensor.make(held, dtype, "a.weight", decode_and_multiply), numbers


# --- models ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [name for name, form in FORMATS.items() if form.linears is not None and not encoding(form.encoding).not_native],
)
def test_every_format_stays_as_it_lies_and_gives_the_numbers_that_it_stands_for(name, written):
    folder = written(name)
    model = _load(folder)
    state, truth = model.state_dict(), _truth(folder)
    found = encoded_weights(model)
    assert any(not weight.held.how.plain for _, weight in found.values())
    for path in found:
        assert torch.equal(state[f"{path}.weight"], truth.state_dict()[f"{path}.weight"]), path
    _assert_close(_logits(model), _logits(truth))
    model.emoe.close(restore=False)


@pytest.mark.parametrize("family", ["qwen2_moe", "deepseek_v3", "gpt_oss", "mixtral", "qwen3_next", "jamba", "olmoe"])
def test_biases_latent_attention_fused_projections_and_tied_heads_are_right(family, tmp_path):
    encode, named = byte("_scale", 1, 0), re.compile(r"(?<!experts\.)\b\w+_proj\w*\.weight$")
    form = Format(encode, "e4m3-row-float32", family=family)
    quantized.write(tmp_path, form, which=lambda name: encode if named.search(name) else None)
    model, truth = _load(tmp_path), _truth(tmp_path)
    assert sum(not weight.held.how.plain for _, weight in encoded_weights(model).values()) >= 4
    _assert_close(_logits(model), _logits(truth))
    wanted = truth.generate(_ids(1), max_new_tokens=5, do_sample=False)
    assert torch.equal(model.generate(_ids(1), max_new_tokens=5, do_sample=False), wanted)
    model.emoe.close(restore=False)


def test_what_is_in_memory_is_what_the_plan_says_and_no_decoded_copy(written):
    for name in ("fp8 blocks", "q4_k", "awq"):
        model = _load(written(name), dense="auto", kernels="native")
        plain = [
            each
            for path, each in (*model.named_parameters(), *model.named_buffers())
            if not isinstance(each, EncodedTensor) and ".experts." not in path
        ]
        in_memory = sum(each.untyped_storage().nbytes() for each in plain) + held_bytes(model)
        assert in_memory == model.emoe.plan.non_expert_bytes == model.get_memory_footprint()
        decoded = emoe.plan(written(name) / "quantized", dtype="float32", calibrate=False, dense="torch")
        assert in_memory < decoded.non_expert_bytes
        assert emoe.plan(
            written(name) / "quantized", dtype="float32", calibrate=False
        ).non_expert_bytes == pytest.approx(in_memory)
        model.emoe.close(restore=False)


@pytest.mark.parametrize("options", [{"dense": "torch", "kernels": "native"}, {"dense": "auto", "kernels": "stock"}])
def test_torch_and_stock_decode(options, written):
    model = _load(written("fp8 blocks"), **options)
    assert not encoded_weights(model)
    _assert_close(_logits(model), _logits(_truth(written("fp8 blocks"))), 1e-4)
    model.emoe.close(restore=False)


def test_an_embedding_and_a_head_stay_encoded_tied_ones_as_one(tmp_path):
    for family, tied in (("qwen3_moe", False), ("tied", True)):
        folder = tmp_path / family
        quantized.write(folder, Format(Q8, "q8_0", family="olmoe" if tied else family), which=_embeddings)
        model, truth = _load(folder, dense="auto", kernels="stock"), _truth(folder)
        assert not encoded_weights(model)
        model.emoe.close(restore=False)
        model = _load(folder)
        found = {path: weight for path, (_, weight) in encoded_weights(model).items() if not weight.held.how.plain}
        assert set(found) == {"model.embed_tokens", "lm_head"}
        assert (found["lm_head"] is found["model.embed_tokens"]) is tied
        _assert_close(_logits(model), _logits(truth))
        state = model.state_dict()
        assert (state["lm_head.weight"] is state["model.embed_tokens.weight"]) is tied
        assert torch.equal(state["lm_head.weight"], truth.state_dict()["lm_head.weight"])
        model.emoe.close()
        assert not encoded_weights(model)
        assert (model.lm_head.weight is model.model.embed_tokens.weight) is tied
        _assert_close(_logits(model), _logits(truth))


def _embeddings(name: str):
    return Q8 if "embed_tokens" in name or "lm_head" in name else None


def test_saving_and_closing_give_ordinary_weights(written, tmp_path):
    folder = written("fp8 blocks")
    model, truth = _load(folder), _truth(folder)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    _assert_close(_logits(again), _logits(truth))
    assert type(model.lm_head.state_dict()["weight"]) is torch.Tensor
    model.emoe.close()
    assert not encoded_weights(model)
    assert all(parameter.requires_grad for parameter in model.parameters())
    _assert_close(_logits(model), _logits(truth), 1e-6)
    model(_ids()).logits.sum().backward()
    assert model.model.layers[0].self_attn.q_proj.weight.grad is not None


def test_loading_its_own_values_does_nothing_and_others_are_refused_before_any_is_taken(written):
    model = _load(written("fp8 blocks"))
    state = {name: value.clone() for name, value in model.state_dict().items()}
    model.load_state_dict(state)
    changed = dict(state)
    changed["model.embed_tokens.weight"] = state["model.embed_tokens.weight"] + 1
    changed["model.layers.1.self_attn.q_proj.weight"] = state["model.layers.1.self_attn.q_proj.weight"] * 2
    with pytest.raises(ExpertsElsewhereError, match=r"layers\.1\.self_attn\.q_proj\.weight stays encoded"):
        model.load_state_dict(changed)
    assert torch.equal(model.model.embed_tokens.weight, state["model.embed_tokens.weight"])
    with pytest.raises(RuntimeError, match="stays encoded"):
        model.model.layers[1].self_attn.q_proj.load_state_dict(
            {"weight": changed["model.layers.1.self_attn.q_proj.weight"]}
        )
    model.emoe.close(restore=False)


def test_another_dtype_is_followed(written):
    folder = written("fp8 blocks")
    model = _load(folder, dtype=torch.bfloat16)
    query = model.model.layers[0].self_attn.q_proj
    assert query.weight.dtype == torch.bfloat16
    nbytes = held_bytes(model)
    model.float()
    assert query.weight.dtype == query(torch.ones(1, 128)).dtype == torch.float32
    assert held_bytes(model) == nbytes
    model.half()
    assert query(torch.ones(1, 128, dtype=torch.half)).dtype == torch.half
    with pytest.raises(ConfigError, match=r"torch\.float16 for 128 inputs; it was given torch\.float32"):
        query(torch.ones(1, 128))
    with torch.autocast("cpu", torch.bfloat16):
        assert query(torch.ones(1, 128)).dtype == torch.bfloat16
    model.emoe.close(restore=False)


def test_an_adapter_runs_on_them_and_cannot_be_merged(written):
    folder = written("fp8 blocks")
    config = LoraConfig(r=4, target_modules=["q_proj", "o_proj"], init_lora_weights=False)
    torch.manual_seed(0)
    plain = get_peft_model(_truth(folder), config).eval()
    model = _load(folder)
    torch.manual_seed(0)
    adapted = get_peft_model(model, config).eval()
    _assert_close(_logits(adapted), _logits(plain))
    with pytest.raises(ExpertsElsewhereError, match="is not written to"):
        adapted.merge_adapter()
    with pytest.raises(EmoeError, match="gradients"):
        adapted.train()(_ids()).logits.sum().backward()


def test_a_router_and_a_layer_whose_weight_is_read_are_decoded_and_named():
    with torch.device("meta"):
        found = {
            name: layers(AutoModelForCausalLM.from_config(families.FAMILIES[name]()))
            for name in ("jamba", "hunyuan_v1_moe", "gemma4_text", "phimoe", "qwen3_moe")
        }
    assert found["jamba"]["model.layers.0.mamba.dt_proj.weight"] == "JambaMambaMixer reads its weight"
    assert "for each expert" in found["hunyuan_v1_moe"]["model.layers.0.mlp.gate.wg.weight"]
    assert "reads its weight" in found["gemma4_text"]["model.embed_tokens.weight"]
    assert "way of its own" in found["phimoe"]["model.layers.0.mlp.router.weight"]
    assert not any(found["qwen3_moe"].values())
    assert not any(".experts." in name for names in found.values() for name in names)


def test_an_embedding_whose_rows_share_blocks_is_decoded():
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(families.FAMILIES["qwen3_moe"](), dtype=torch.bfloat16)
    name = "model.embed_tokens.weight"
    assert kept(model, {name: "e4m3-128x128-float32"}) == {}
    assert kept(model, {name: "e4m3-row-float32"}) == {name: "e4m3-row-float32"}
    assert kept(model.double(), {"lm_head.weight": "q8_0"}) == {}


# --- the tensor ------------------------------------------------------------------------------------------------------

USES = {
    "transposed": lambda w: w.t(),
    "product": lambda w: w @ torch.ones(96),
    "slice": lambda w: w[3:9, 2:5],
    "one row": lambda w: w[7],
    "sum": lambda w: w.sum(1),
    "view": lambda w: w.view(4, 16, 96),
    "einsum": lambda w: torch.einsum("oi,i->o", w, torch.arange(96.0)),
    "split": lambda w: torch.cat(w.split([32, 32])),
    "float64": lambda w: w.double() * 2,
    "data": lambda w: w.data + 0,
    "list": lambda w: torch.tensor(w.tolist()),
    "numpy": lambda w: torch.from_numpy(w.detach().numpy()),
    "stack": lambda w: torch.stack([w, w]),
    "clone": lambda w: w.clone().mul(1),
    "conv1d": lambda w: F.conv1d(torch.ones(1, 96, 3), w[:, :, None]),
    "linear of a part": lambda w: F.linear(torch.ones(2, 96), w[:8]),
    "as input": lambda w: F.linear(w, torch.ones(3, 96)),
    "norm": lambda w: torch.linalg.norm(w),
    "changed clone": lambda w: w.clone().mul_(2),
    "changed part": lambda w: w[3:5].clone().add_(1),
    "sum of a part": lambda w: w.t()[2:5].sum(1),
    "product of a part": lambda w: w[:, :8] * 2,
    "into another": lambda w: torch.zeros(64, 96).copy_(w),
}


@pytest.mark.parametrize("use", USES)
def test_whoever_uses_it_otherwise_gets_its_numbers(use):
    weight, numbers = _weight()
    assert torch.equal(USES[use](nn.Parameter(weight, requires_grad=False)), USES[use](numbers))


WRITES = {
    "add_": lambda w: w.add_(1),
    "+=": lambda w: w.__iadd__(1),
    "data": lambda w: w.data.mul_(2),
    "copy_": lambda w: w.copy_(torch.zeros(64, 96)),
    "row": lambda w: w.__setitem__(0, 1.0),
    "zero_": lambda w: w.zero_(),
    "init": lambda w: nn.init.normal_(w),
    "out": lambda w: torch.add(torch.zeros(64, 96), 1, out=w),
    "resize_": lambda w: w.resize_(3),
    "foreach": lambda w: torch._foreach_add_([w], 1.0),
    "fill_diagonal_": lambda w: w.fill_diagonal_(0),
    "slice": lambda w: w[3:9].zero_(),
    "slice of a slice": lambda w: w.t()[1:, 2].add_(1),
    "element of a view": lambda w: w.view(-1).__setitem__(5, 2.0),
    "part of data": lambda w: w.data[2].mul_(3),
    "out a part": lambda w: torch.add(torch.zeros(96), 1, out=w[3]),
    "chunks": lambda w: torch._foreach_mul_(list(w.chunk(2)), 2.0),
    "copy_ into a part": lambda w: w[:2].copy_(torch.zeros(2, 96)),
}


@pytest.mark.parametrize("write", WRITES)
def test_whoever_writes_to_it_is_refused(write):
    weight, numbers = _weight()
    with pytest.raises(ExpertsElsewhereError, match=r"a\.weight stays encoded in memory \(q8_0\)"):
        WRITES[write](nn.Parameter(weight, requires_grad=False))
    assert torch.equal(weight.numbers(), numbers)


@pytest.mark.parametrize("name", ["data_ptr", "untyped_storage", "share_memory_", "storage"])
def test_whoever_wants_its_memory_is_refused(name):
    weight, _ = _weight()
    with pytest.raises(ExpertsElsewhereError, match="has no storage of numbers"):
        getattr(weight, name)()


def test_it_says_of_itself_what_the_plain_weight_would():
    weight, numbers = _weight(dtype=torch.bfloat16)
    layer = nn.Linear(96, 64, device="meta")
    layer.weight = nn.Parameter(weight)
    assert isinstance(layer.weight, nn.Parameter)
    assert layer.weight.device == torch.device("cpu")
    assert layer.weight.dtype == torch.bfloat16
    assert layer.weight.shape == (64, 96)
    assert layer.weight.numel() == 64 * 96
    assert layer.weight.is_contiguous()
    assert not layer.weight.is_meta
    assert repr(layer.weight) == "<a.weight: [64, 96] torch.bfloat16, encoded as q8_0>"
    assert torch.equal(layer.weight.numbers(), numbers.bfloat16())


def test_a_copy_shares_its_bytes_and_a_pickle_is_an_ordinary_tensor():
    weight, numbers = _weight()
    layer = nn.Linear(96, 64, bias=False, device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=False)
    other = copy.deepcopy(layer)
    assert other.weight.held is weight.held
    for loaded in (pickle.loads(pickle.dumps(layer)), _saved(layer)):
        assert type(loaded.weight) is nn.Parameter
        assert torch.equal(loaded.weight, numbers)


def _saved(value):
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("name", ["q8_0", "q4_0", "q4_k", "q6_k", "gguf_mxfp4"])
def test_an_embedding_decodes_the_rows_that_are_asked_for(name):
    weight, numbers = _weight(name, 40, 512, torch.bfloat16)
    embedding = nn.Embedding(40, 512, padding_idx=0, device="meta")
    embedding.weight = nn.Parameter(weight, requires_grad=False)
    ids = torch.tensor([[3, 39, 3], [0, 1, 7]])
    assert torch.equal(embedding(ids), F.embedding(ids, numbers.bfloat16()))
    assert embedding(torch.empty(2, 0, dtype=torch.long)).shape == (2, 0, 512)
    for wrong in (40, -1):
        with pytest.raises(IndexError):
            embedding(torch.tensor([wrong]))


def test_a_linear_layer_takes_any_leading_shape_and_no_other_width():
    weight, numbers = _weight()
    bias = torch.randn(64, generator=torch.Generator().manual_seed(2))
    for shape in ((96,), (1, 96), (2, 3, 96), (0, 96)):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(4))
        torch.testing.assert_close(F.linear(x, weight, bias), F.linear(x, numbers, bias))
    with pytest.raises(ConfigError, match=r"96 inputs; it was given torch\.float32 \[2, 95\]"):
        F.linear(torch.ones(2, 95), weight)
    with pytest.raises(EmoeError, match="gradients"):
        F.linear(torch.ones(2, 96, requires_grad=True), weight)


# --- plain checkpoints -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A checkpoint in bfloat16, routers and norms among its weights."""
    folder = tmp_path_factory.mktemp("plain")
    quantized.write(folder, Format(Q8, "q8_0", family="qwen3_moe"), which=lambda name: None, rest=torch.bfloat16)
    return folder


@pytest.mark.parametrize(
    ("encoding", "held_as", "most"),
    [("bfloat16", "bfloat16", 0), ("q8_0", "q8_0", 0.01), ("q4_0", "q4_0", 0.12), ("mxfp4", "mxfp4", 0.15),
     ("fp8", "e4m3-128x128-float32", 0.04)],
)  # fmt: skip
def test_plain_linear_layers_are_encoded_when_they_are_loaded(encoding, held_as, most, plain):
    model = _load(plain, dense_encoding=encoding)
    found = encoded_weights(model)
    assert set(found) == {path for path, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert {weight.held.how.name for _, weight in found.values()} == {held_as}
    truth = _truth(plain)
    for path, (_, weight) in found.items():
        own = truth.get_submodule(path).weight
        assert (weight.numbers() - own).norm() / own.norm() <= most
    truth.load_state_dict(model.state_dict())
    _assert_close(_logits(model), _logits(truth))
    in_memory = held_bytes(model) + sum(
        each.numel() * each.dtype.itemsize
        for path, each in (*model.named_parameters(), *model.named_buffers())
        if ".experts." not in path and not isinstance(each, EncodedTensor)
    )
    assert in_memory == model.emoe.plan.non_expert_bytes
    assert model.emoe.stats()["dense"] == {
        "bytes": held_bytes(model), "encodings": {held_as: len(found)}, "decoded": {}, "plain": 2,
    }  # fmt: skip
    model.emoe.close(restore=False)


def test_a_layer_that_is_no_whole_number_of_blocks_stays_plain(tmp_path):
    quantized.write(tmp_path, Format(Q8, "q8_0", family="dots1"), which=lambda name: None)
    model = _load(tmp_path, dense_encoding="q8_0")
    found = encoded_weights(model)
    narrow = [
        path for path, module in model.named_modules() if isinstance(module, nn.Linear) and module.in_features % 32
    ]
    assert narrow
    assert not set(narrow) & set(found)
    _assert_close(_logits(model), _logits(_truth(tmp_path)), 0.05)
    model.emoe.close(restore=False)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"dense_encoding": "q8_0", "dense": "torch"}, "dense_encoding='q8_0' is for the native kernels"),
        ({"dense_encoding": "q8_0", "dense": "auto", "kernels": "stock"}, "dense_encoding='q8_0' is for the native"),
        ({"dense_encoding": "q4"}, "dense_encoding='q4' is not one of: keep, bfloat16, q8_0"),
        ({"dense": "naive"}, "dense='naive' is not one of: auto, native, torch; did you mean 'native'"),
        ({"dense": "native", "device": "cuda"}, "dense='native' computes on the CPU"),
    ],
)
def test_options_that_contradict_each_other_are_refused(options, said, plain):
    with pytest.raises(ConfigError, match=re.escape(said)):
        _load(plain, **options)


def test_what_was_decoded_is_named_with_its_reason(tmp_path):
    """deepseek_v4 has a grouped layer with a forward of its own."""
    quantized.write(tmp_path, FORMATS["deepseek-v4"])
    model = _load(tmp_path)
    decoded = model.emoe.stats()["dense"]["decoded"]
    assert decoded["model.layers.0.self_attn.o_a_proj.weight"] == (
        "e4m3-128x128-e8m0: DeepseekV4GroupedLinear computes in a way of its own"
    )
    model.emoe.close(restore=False)


def test_a_state_dict_that_does_not_fit_is_refused(written, monkeypatch):
    model = _load(written("fp8 blocks"))
    monkeypatch.setattr("emoe.seam.linear.available_memory", lambda: 1000)
    with pytest.raises(SaveError, match=r"KiB for model\.layers\.1\.self_attn\.q_proj\.weight, which is encoded in"):
        model.model.layers[1].self_attn.q_proj.state_dict()
    model.emoe.close(restore=False)


def test_whoever_decodes_it_is_told_once(caplog):
    weight, _ = _weight()
    weight.path = "told.once"
    for _ in range(3):
        weight.sum()
    assert [record.getMessage() for record in caplog.records] == [
        "emoe: told.once is encoded, and decoded for each aten.sum.default"
    ]
