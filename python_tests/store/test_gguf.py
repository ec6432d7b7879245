"""GGUF checkpoints: experts in place in every kind of block, files in parts, and files that are damaged."""

from __future__ import annotations

import random
import shutil
from pathlib import Path
from typing import Any

import families
import gguf
import gguf_models as gg
import numpy as np
import pytest
import torch
import transformers as tf

import emoe
from emoe import errors
from emoe.files.gguf import open_header, parts
from emoe.store import read_layer
from emoe.store.gguf import GgufCheckpoint

BLOCKS = (
    "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ1_S", "IQ1_M", "IQ2_XXS",
    "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_NL", "IQ4_XS", "MXFP4",
)  # fmt: skip
E, WIDTH = 4, 256
_SIZES = {"hidden_size": 256, "num_hidden_layers": 2, "num_experts_per_tok": 2, "vocab_size": 64}


def qwen3moe() -> Any:
    """A model whose rows are whole blocks of 256."""
    return families._config(
        tf.Qwen3MoeConfig, _SIZES, moe_intermediate_size=WIDTH, intermediate_size=WIDTH, num_experts=E, head_dim=64,
        norm_topk_prob=True,
    )()  # fmt: skip


def gpt_oss() -> Any:
    """Experts transposed, gate and up interleaved, with biases."""
    return families._config(
        tf.GptOssConfig, _SIZES, intermediate_size=WIDTH, num_local_experts=E, head_dim=64, sliding_window=16
    )()


def build(config: Any) -> Any:
    torch.manual_seed(0)
    model = tf.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    families.randomize(model)
    return model


def said(config: Any) -> dict[str, Any]:
    own = {"attention.key_length": 64, "attention.value_length": 64, "expert_count": E}
    if config.model_type == "gpt_oss":
        own |= {
            "attention.sliding_window": 16, "rope.scaling.type": "yarn", "rope.scaling.factor": 32.0,
            "rope.scaling.original_context_length": 4096,
        }  # fmt: skip
    return gg.base(config, **own)


def architecture(config: Any) -> str:
    return {"qwen3_moe": "qwen3moe", "gpt_oss": "gpt-oss"}[config.model_type]


def write(path: Path, config: Any, kinds: dict[str, str], *, fused: bool = False, **kwargs: Any) -> tuple[Any, Path]:
    """A file whose experts are random blocks; the model holds what they stand for.

    Args:
        kinds: "gate", "up", "down" -> ggml's type, of layer 0; in layer 1 gate and down are exchanged.

    Returns:
        (the model, the file)
    """
    model = build(config)
    tensors = gg.arrays(model, architecture(config))
    raw, types = {}, {}
    for layer in range(config.num_hidden_layers):
        experts = model.model.layers[layer].mlp.experts
        order = kinds if layer == 0 else {**kinds, "gate": kinds["down"], "down": kinds["gate"]}
        made = {}
        for number, (kind, its) in enumerate(order.items()):
            name = f"blk.{layer}.ffn_{kind}_exps.weight"
            types[name] = its
            if its in ("F32", "F16", "BF16"):
                made[kind] = tensors[name].to({"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[its])
                made[kind] = made[kind].float()
            else:
                raw[name], made[kind] = gg.blocks(tuple(tensors[name].shape), its, seed=10 * layer + number)
            tensors[name] = made[kind]
        with torch.no_grad():
            _put(experts, made)
        if fused:
            both = f"blk.{layer}.ffn_gate_up_exps.weight"
            gate, up = (f"blk.{layer}.ffn_{kind}_exps.weight" for kind in ("gate", "up"))
            raw[both], types[both] = np.concatenate([raw.pop(gate), raw.pop(up)], axis=1), types[gate]
            tensors[both] = torch.cat([tensors.pop(gate), tensors.pop(up)], dim=1)
    file = gg.write(
        path, architecture(config), tensors, said(config), kinds=lambda name: types.get(name, "F32"), raw=raw, **kwargs
    )
    return model, file


def _put(experts: Any, made: dict[str, torch.Tensor]) -> None:
    if experts.is_transposed:
        experts.gate_up_proj[..., ::2], experts.gate_up_proj[..., 1::2] = made["gate"].mT, made["up"].mT
        experts.down_proj.copy_(made["down"].mT)
    else:
        experts.gate_up_proj.copy_(torch.cat([made["gate"], made["up"]], dim=1))
        experts.down_proj.copy_(made["down"])


def logits(model: Any) -> torch.Tensor:
    ids = torch.randint(3, 64, (2, 24), generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        return model(ids).logits.float()


def ran(path: Any, budget: Any = 1.0, **kwargs: Any) -> torch.Tensor:
    """Logits of a checkpoint under emoe, in float32."""
    model = emoe.from_pretrained(path, memory_budget=budget, dtype="float32", kernels="stock", **kwargs)
    try:
        return logits(model)
    finally:
        model.emoe.close(restore=False)


def difference(got: torch.Tensor, expected: torch.Tensor) -> float:
    return ((got - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("kind", BLOCKS)
def test_experts_in_blocks_are_computed_as_what_they_stand_for(kind, tmp_path):
    model, path = write(tmp_path / "m.gguf", qwen3moe(), dict.fromkeys(("gate", "up", "down"), kind))
    assert difference(ran(path), logits(model)) < 1e-5
    with GgufCheckpointed(path, model) as store:
        for layer in range(2):
            for name, values in read_layer(store, layer).items():
                assert torch.equal(values, getattr(model.model.layers[layer].mlp.experts, name)), name


class GgufCheckpointed:
    """The store of a file, for a model in memory."""

    def __init__(self, path: Path, model: Any) -> None:
        self._store = GgufCheckpoint(parts(path)).index(model)

    def __enter__(self) -> Any:
        return self._store

    def __exit__(self, *error: Any) -> None:
        self._store.close()


@pytest.mark.parametrize("config", [qwen3moe, gpt_oss])
@pytest.mark.parametrize(
    "kinds",
    [("Q4_K", "Q4_K", "Q6_K"), ("MXFP4", "MXFP4", "MXFP4"), ("Q8_0", "Q5_0", "BF16"), ("F16", "Q4_0", "F32"),
     ("F32", "F32", "F32"), ("BF16", "F16", "F32")],
)  # fmt: skip
def test_every_tensor_has_a_type_of_its_own(config, kinds, tmp_path):
    model, path = write(tmp_path / "m.gguf", config(), dict(zip(("gate", "up", "down"), kinds, strict=True)))
    expected = logits(model)
    for budget in (1.0, 0.25):
        assert difference(ran(path, budget), expected) < 1e-5


def test_gate_and_up_in_one_tensor_are_gate_first(tmp_path):
    model, path = write(tmp_path / "m.gguf", qwen3moe(), dict.fromkeys(("gate", "up", "down"), "Q4_K"), fused=True)
    assert difference(ran(path), logits(model)) < 1e-5


def mixtral() -> Any:
    return families._config(tf.MixtralConfig, _SIZES, intermediate_size=WIDTH, num_local_experts=E)()


def _apart(path: Path, kinds: dict[str, str], change: Any = None) -> tuple[Any, Path]:
    """Mixtral as converters wrote it until April 2024: a tensor for each expert."""
    model = build(mixtral())
    tensors = gg.arrays(model, "llama")
    raw, types = {}, {}
    for layer in range(2):
        made = {}
        for number, (kind, its) in enumerate(kinds.items()):
            name = f"blk.{layer}.ffn_{kind}_exps.weight"
            blocks, made[kind] = gg.blocks(tuple(tensors.pop(name).shape), its, seed=10 * layer + number)
            for expert in range(E):
                own = f"blk.{layer}.ffn_{kind}.{expert}.weight"
                tensors[own], raw[own], types[own] = made[kind][expert], blocks[expert], its
        with torch.no_grad():
            _put(model.model.layers[layer].mlp.experts, made)
    if change is not None:
        change(tensors, raw, types)
    metadata = gg.base(model.config, **{"expert_count": E, "rope.dimension_count": 64})
    return model, gg.write(path, "llama", tensors, metadata, kinds=lambda name: types.get(name, "F32"), raw=raw)


@pytest.mark.parametrize("kinds", [("Q4_K", "Q4_K", "Q6_K"), ("Q8_0", "Q8_0", "Q8_0")])
def test_experts_of_old_files_are_tensors_of_their_own(kinds, tmp_path):
    model, path = _apart(tmp_path / "m.gguf", dict(zip(("gate", "up", "down"), kinds, strict=True)))
    expected = logits(model)
    for budget in (1.0, 0.25):
        assert difference(ran(path, budget), expected) < 1e-5
    plan = emoe.plan(path, 0.5, calibrate=False)
    assert plan.encodings == tuple(dict.fromkeys(kind.lower() for kind in kinds))


def test_an_expert_that_an_old_file_lacks_or_has_in_another_type_is_named(tmp_path):
    kinds = dict.fromkeys(("gate", "up", "down"), "Q8_0")

    def lose(tensors, raw, types):
        for each in (tensors, raw, types):
            del each["blk.1.ffn_up.2.weight"]

    def differ(tensors, raw, types):
        name = "blk.1.ffn_down.3.weight"
        raw[name], tensors[name] = gg.blocks(tuple(tensors[name].shape), "Q4_0", seed=5)
        types[name] = "Q4_0"

    for number, (change, words) in enumerate(
        ((lose, r"lacks tensor blk\.1\.ffn_up\.2\.weight"), (differ, r"ffn_down\.3\.weight.*have to be encoded alike"))
    ):
        _, path = _apart(tmp_path / f"{number}.gguf", kinds, change)
        with pytest.raises(errors.CheckpointError, match=words):
            ran(path)


def test_bytes_of_an_expert_are_those_of_the_file(tmp_path):
    _, path = write(tmp_path / "m.gguf", qwen3moe(), {"gate": "Q4_K", "up": "Q4_K", "down": "Q6_K"})
    plan = emoe.plan(path, 1.0, calibrate=False)
    entries = [each for each in open_header(path).tensors.values() if "_exps" in each.name]
    assert plan.expert_bytes == sum(each.nbytes for each in entries)
    assert set(plan.encodings) == {"q4_k", "q6_k"}
    model = emoe.from_pretrained(path, memory_budget=1.0, kernels="stock")
    assert model.emoe.plan.expert_bytes == plan.expert_bytes
    assert model.dtype == torch.bfloat16
    model.emoe.close(restore=False)


def test_a_piece_is_a_slab_of_a_tensor(tmp_path):
    model, path = write(tmp_path / "m.gguf", qwen3moe(), {"gate": "Q4_K", "up": "Q4_K", "down": "Q6_K"})
    tensors = open_header(path).tensors
    with GgufCheckpointed(path, model) as store:
        for expert, pieces in enumerate(store.layers[0].pieces):
            assert [piece.tensor for piece in pieces] == sorted(
                (f"blk.0.ffn_{kind}_exps.weight" for kind in ("gate", "up", "down")),
                key=lambda name: tensors[name].offset,
            )
            for piece in pieces:
                tensor = tensors[piece.tensor]
                assert piece.nbytes == tensor.nbytes // E
                assert piece.offset == tensor.offset + expert * piece.nbytes


# ---- which files


_PLAIN = {"gate": "Q8_0", "up": "Q8_0", "down": "Q8_0"}


@pytest.fixture(scope="module")
def single(tmp_path_factory) -> tuple[Any, Path]:
    """(model, file)"""
    return write(tmp_path_factory.mktemp("single") / "m.gguf", qwen3moe(), _PLAIN)


@pytest.fixture(scope="module")
def several(tmp_path_factory) -> tuple[Any, Path]:
    """(model, first of several parts)"""
    return write(tmp_path_factory.mktemp("several") / "m.gguf", qwen3moe(), _PLAIN, parts=9)


def test_a_path_a_folder_and_a_name_in_it_are_the_same_checkpoint(single, tmp_path):
    model, path = single
    expected = logits(model)
    shutil.copy(path, tmp_path / "other.gguf")
    shutil.copy(path, tmp_path / "m.gguf")
    assert difference(ran(path), expected) < 1e-5
    assert difference(ran(str(path)), expected) < 1e-5
    assert difference(ran(path.parent), expected) < 1e-5
    blob = shutil.copy(path, tmp_path / "sha256-0123")  # as Ollama names it
    assert difference(ran(blob), expected) < 1e-5
    Path(blob).unlink()
    assert difference(ran(tmp_path, gguf_file="m.gguf"), expected) < 1e-5
    assert difference(ran(tmp_path.parent, subfolder=tmp_path.name, gguf_file="m.gguf"), expected) < 1e-5
    with pytest.raises(
        errors.ConfigError, match=r"holds 2 GGUF checkpoints: m\.gguf, other\.gguf; gguf_file= says which"
    ):
        emoe.plan(tmp_path)
    with pytest.raises(errors.CheckpointError, match=r"there is no file '.*nothing\.gguf'"):
        emoe.plan(tmp_path, gguf_file="nothing.gguf")
    with pytest.raises(errors.CheckpointError, match=r"there is no file '.*nothing\.gguf'"):
        emoe.plan(tmp_path / "nothing.gguf")


def test_safetensors_beside_a_gguf_file_are_taken_unless_it_is_named(single, tmp_path):
    model, path = single
    model.save_pretrained(tmp_path)
    shutil.copy(path, tmp_path / "m.gguf")
    assert emoe.plan(tmp_path, 1.0, calibrate=False).encodings == ("float32",)
    assert emoe.plan(tmp_path, 1.0, calibrate=False, gguf_file="m.gguf").encodings == ("q8_0",)


def test_a_name_in_a_repository_of_the_hub_is_found_in_its_cache(several, tmp_path):
    model, path = several
    revision = "0" * 40
    cached = tmp_path / "models--someone--model-GGUF"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text(revision)
    shutil.copytree(path.parent, cached / "snapshots" / revision)
    where = {"gguf_file": path.name, "cache_dir": tmp_path, "local_files_only": True}
    assert difference(ran("someone/model-GGUF", **where), logits(model)) < 1e-5
    with pytest.raises(errors.CheckpointError, match="someone/model-GGUF"):
        emoe.plan("someone/model-GGUF", **{**where, "gguf_file": "other.gguf"})


def test_any_part_leads_to_the_others(several):
    model, path = several
    expected = logits(model)
    assert len(parts(path)) > 2
    for part in (path, parts(path)[-1], path.parent):
        assert difference(ran(part), expected) < 1e-5


def test_parts_that_are_missing_exchanged_or_of_another_checkpoint_are_refused(several, single, tmp_path):
    def copied(name: str) -> list[Path]:
        return parts(Path(shutil.copytree(several[1].parent, tmp_path / name)) / several[1].name)

    files = copied("missing")
    files[1].unlink()
    with pytest.raises(errors.CheckpointError, match=rf"no file '.*{files[1].name}'; it is one of {len(files)} parts"):
        emoe.plan(files[0])
    files = copied("exchanged")
    files[1].rename(files[1].with_name("x"))
    files[2].rename(files[1])
    files[1].with_name("x").rename(files[2])
    with pytest.raises(errors.CheckpointError, match=r"should be part 2 of \d.*split\.no=2"):
        emoe.plan(files[0])
    files = copied("foreign")
    shutil.copy(single[1], files[1])
    with pytest.raises(errors.CheckpointError, match=r"should be part 2 of \d.*split\.no=None"):
        emoe.plan(files[0])
    files = copied("renamed")
    alone = files[0].rename(files[0].with_name("model.gguf"))
    with pytest.raises(errors.CheckpointError, match=r"part 1 of \d by its header.*give all parts their names back"):
        emoe.plan(alone)


# ---- what is refused


def test_experts_in_types_without_an_encoding_are_refused_by_name(tmp_path):
    model, _ = write(tmp_path / "m.gguf", qwen3moe(), _PLAIN)
    tensors = gg.arrays(model, "qwen3moe")
    name = "blk.1.ffn_up_exps.weight"
    raw = {name: np.zeros((E, WIDTH, 54), np.uint8)}
    path = gg.write(
        tmp_path / "m.gguf", "qwen3moe", tensors, said(model.config), raw=raw,
        kinds=lambda each: "TQ1_0" if each == name else "F32",
    )  # fmt: skip
    for call in (emoe.plan, emoe.from_pretrained):
        with pytest.raises(errors.CheckpointError, match=rf"{name} \(tq1_0.*reads no experts in; it reads q8_0") as e:
            call(path)
        assert e.value.tensor == name
        assert e.value.nbytes == E * WIDTH * 54


def _of_kind(kind: str, shape: tuple[int, ...]) -> np.ndarray:
    if kind.startswith("I"):
        return np.ones(shape, f"int{kind[1:]}")
    values, nbytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    return np.zeros((*shape[:-1], shape[-1] // values * nbytes), np.uint8)


@pytest.mark.parametrize("kind", ["NVFP4", "I8", "I16", "I32", "I64", "Q8_1", "Q8_K", "Q1_0"])
@pytest.mark.parametrize("name", ["blk.1.ffn_up_exps.weight", "blk.0.attn_q.weight", "token_embd.weight"])
def test_types_that_are_no_numbers_or_lack_their_scale_are_refused_before_they_are_read(name, kind, tmp_path):
    """Our own NVFP4 lies in other bytes than ggml's type of that name, whose scale is a tensor of its own."""
    model, _ = write(tmp_path / "m.gguf", qwen3moe(), _PLAIN)
    tensors = gg.arrays(model, "qwen3moe")
    raw = {name: _of_kind(kind, tuple(tensors[name].shape))}
    path = gg.write(
        tmp_path / "m.gguf", "qwen3moe", tensors, said(model.config), raw=raw,
        kinds=lambda each: kind if each == name else "F32",
    )  # fmt: skip
    called = {"NVFP4": "gguf_nvfp4", **{f"I{bits}": f"int{bits}" for bits in (8, 16, 32, 64)}}.get(kind, kind.lower())
    for call in (emoe.plan, emoe.from_pretrained):
        with pytest.raises(errors.CheckpointError, match=rf"{name} \({called}\[") as caught:
            call(path)
        assert caught.value.tensor == name and caught.value.file == str(path)
        assert caught.value.nbytes == raw[name].nbytes


@pytest.mark.parametrize(
    ("change", "said_of_it"),
    [
        (lambda each: each.pop("blk.1.ffn_up_exps.weight"), r"lacks tensor blk\.1\.ffn_up_exps\.weight"),
        (
            lambda each: each.pop("blk.0.attn_q.weight"),
            r"lacks tensor blk\.0\.attn_q\.weight, which makes model\.layers",
        ),
        (lambda each: each.update({"blk.0.attn_q.weight": torch.zeros(256, 128)}), r"has not the shape \[256, 256\]"),
        (lambda each: each.update({"blk.0.ffn_gate_exps.weight": torch.zeros(E, 128, 256)}), "has not the shape"),
        (
            lambda each: each.update({"blk.0.ffn_up_exps.bias": torch.zeros(E, 256)}),
            "has no place for tensor blk.0.ffn_up",
        ),
        (lambda each: each.update({"rope_freqs.weight": torch.zeros(32)}), "has no place for tensor rope_freqs.weight"),
        (lambda each: each.update({"blk.0.ffn_up_exps.scale": torch.zeros(E)}), "has no place for tensor"),
    ],
)
def test_tensors_that_are_missing_left_over_or_of_another_shape_are_refused(change, said_of_it, tmp_path):
    model = build(qwen3moe())
    tensors = gg.arrays(model, "qwen3moe")
    change(tensors)
    path = gg.write(tmp_path / "m.gguf", "qwen3moe", tensors, said(model.config))
    with pytest.raises((errors.CheckpointError, errors.UnsupportedModelError), match=said_of_it):
        emoe.from_pretrained(path)


def test_a_file_that_changes_while_a_model_runs_is_found_out(tmp_path):
    _, path = write(tmp_path / "m.gguf", qwen3moe(), _PLAIN)
    model = emoe.from_pretrained(path, memory_budget=0.25, dtype="float32", kernels="stock")
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - 4096)
    with pytest.raises(errors.ReadError, match="changed since the model was loaded"):
        logits(model)
    model.emoe.close(restore=False)


# ---- damage


def test_a_file_cut_short_anywhere_is_an_error_that_names_it(single, tmp_path):
    data = single[1].read_bytes()
    path = tmp_path / "cut.gguf"
    header = min(each.offset for each in open_header(single[1]).tensors.values())
    for size in (0, 3, 4, 8, 20, 24, 100, header // 2, header - 40, header, header + 1, len(data) // 2, len(data) - 33):
        path.write_bytes(data[:size])
        with pytest.raises(errors.CheckpointError, match=r"cut\.gguf") as e:
            emoe.plan(path)
        assert e.value.file == str(path)
        if size > header:
            assert e.value.tensor
            assert e.value.offset + e.value.nbytes > size


def test_headers_damaged_anywhere_are_refused_or_read_and_never_hang(single, tmp_path):
    """Bytes set to others, at random and to the extremes, all over the header."""
    data = single[1].read_bytes()
    start = min(each.offset for each in open_header(single[1]).tensors.values())
    path = tmp_path / "damaged.gguf"
    draw = random.Random(0)
    refused = 0
    for round_ in range(400):
        damaged = bytearray(data)
        for _ in range(draw.choice((1, 1, 2, 8))):
            at = draw.randrange(start)
            length = draw.choice((1, 1, 4, 8))
            value = draw.choice((b"\xff", b"\x00", b"\x7f", bytes([draw.randrange(256)])))
            damaged[at : at + length] = value * length
        path.write_bytes(damaged)
        try:
            open_header(path)
        except errors.CheckpointError as error:
            refused += 1
            assert error.file == str(path), round_
    assert refused > 50


@pytest.mark.parametrize(
    ("head", "said_of_it"),
    [
        (b"GGML", "is no GGUF file: it begins with b'GGML'"),
        (b"GGUF\x01\0\0\0", "is GGUF of version 1; emoe reads 2 and 3"),
        (b"GGUF\0\0\0\x03", r"\(its numbers are big-endian\)"),
        (b"GGUF\x03\0\0\0" + b"\xff" * 8, "truncated or damaged|is damaged"),
        (b"GGUF\x03\0\0\0" + b"\0" * 8 + b"\xff" * 8, "truncated or damaged|is damaged|twice"),
    ],
)
def test_what_is_no_gguf_file_is_said_to_be_none(head, said_of_it, single, tmp_path):
    data = single[1].read_bytes()
    path = tmp_path / "m.gguf"
    path.write_bytes(head + data[len(head) :])
    with pytest.raises(errors.CheckpointError, match=said_of_it):
        emoe.plan(path)


@pytest.mark.parametrize("shift", [32, 1 << 20, 1])
def test_tensors_that_lie_over_one_another_or_askew_are_refused(shift, single, tmp_path):
    """The offset of one tensor, the last number of its entry, is moved."""
    path = tmp_path / "m.gguf"
    data = bytearray(single[1].read_bytes())
    name = b"blk.0.ffn_up_exps.weight"
    at = data.index(name) + len(name) + 4 + 3 * 8 + 4
    offset = int.from_bytes(data[at : at + 8], "little")
    data[at : at + 8] = (offset - shift if shift == 32 else offset + shift).to_bytes(8, "little")
    path.write_bytes(data)
    with pytest.raises(errors.CheckpointError, match=r"overlaps|reaches beyond|multiple of 32"):
        emoe.plan(path)
