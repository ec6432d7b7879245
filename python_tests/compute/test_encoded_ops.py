"""The native kernels on encoded experts: every encoding against float64 arithmetic on what emoe.model.decode says."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from transformers import GptOssConfig, MixtralConfig, NemotronHConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.mixtral.modeling_mixtral import MixtralExperts
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts

from emoe import native
from emoe.compute import ops
from emoe.errors import BackendUnavailable, ConfigError
from emoe.model.decode import decode, parameter
from emoe.model.encoding import ENCODINGS, ITEMSIZE, EncodedMatrix, encoding
from emoe.model.layout import describe
from emoe.model.spec import ExpertForm, ParamSpec

C = native.load()
E, H, I, K = 3, 512, 256, 2
LIMIT = 1.5

# Where the 16-bit scales of a block lie: random bytes there would be infinite.
HALVES = {
    "q8_0": (0,), "q4_0": (0,), "q4_1": (0, 2), "q5_0": (0,), "q5_1": (0, 2), "iq4_nl": (0,), "q2_k": (80, 82),
    "q3_k": (108,), "q4_k": (0, 2), "q5_k": (0, 2), "q6_k": (208,), "iq4_xs": (0,), "gguf_mxfp4": (),
    "iq1_s": (0,), "iq1_m": (), "iq2_xxs": (0,), "iq2_xs": (0,),
    "iq2_s": (0,), "iq3_xxs": (0,), "iq3_s": (0,),
}  # fmt: skip
NAMES = (
    "float32", "float16", "bfloat16", *HALVES, "mxfp4", "nvfp4", "nvfp4_divided",
    "e4m3-128x128-float32", "e4m3-128x128-bfloat16", "e4m3-128x128-e8m0", "e4m3-row-float16", "e4m3-tensor-float32",
    "e4m3-1x32-e8m0", "e4m3-48x80-float32", "e5m2-32x32-float32", "e5m2-row-bfloat16", "int8-row-float32",
    "int8-tensor-bfloat16", "int8-1x128-float32", "uint8b128-1x128-bfloat16", "uint8b128-row-float16",
    "int4-32-bfloat16", "int4-128-float16", "int4-32-float16-zeros",
    "int4-row-float32", "awq-128-float16", "awq-64-float16", "awq-32-bfloat16", "gptq-128-float16", "gptq-row-float16",
    "gptq_v2-64-float16",
)  # fmt: skip


def random_planes(name: str, rows: int, cols: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Random arrays that stand for weights of about 1 / sqrt(cols)."""
    how, size = encoding(name), 1 / math.sqrt(cols)
    planes = {}
    for plane, shape in how.shapes(rows, cols).items():
        dtype = getattr(torch, how.plane(plane).dtype)  # type: ignore[union-attr]
        if dtype.itemsize == 4 and plane in ("codes", "zeros"):
            planes[plane] = torch.randint(-(1 << 31), 1 << 31, shape, generator=generator).to(dtype)
        elif plane in ("values", "scales", "factor") and how.scale != "e8m0":
            value = torch.rand(shape, generator=generator) + 0.5
            value *= 0.3 if plane == "factor" and name == "nvfp4" else 4 if plane == "factor" else size
            planes[plane] = (value * 32 if how.scale == "e4m3" and plane == "scales" else value).to(dtype)
        elif plane == "scales":
            planes[plane] = torch.randint(115, 121, shape, generator=generator).to(dtype)
        else:
            codes = torch.randint(0, 256, shape, generator=generator).to(torch.uint8)
            if how.codes in ("e4m3", "e5m2"):  # neither NaN nor infinite
                codes = torch.where((codes & 0x7C) == 0x7C, codes & 0xBF, codes)
            planes[plane] = codes.view(dtype)
    if "blocks" in planes:
        blocks = planes["blocks"].view(rows, -1, how.planes[0].count)
        for at in HALVES[name]:
            value = (torch.rand(blocks.shape[:2], generator=generator) + 0.5) * size / 8
            blocks[..., at : at + 2] = value.to(torch.float16)[..., None].view(torch.uint8)
        if name == "iq1_m":  # its scale is 0x1...
            blocks[..., 55] = blocks[..., 55] & 15 | 16
        if name == "gguf_mxfp4":
            blocks[..., 0] = torch.randint(115, 121, blocks.shape[:2], generator=generator)
    return planes


@dataclass
class Expert:
    """E experts of one form in slots of odd distance, expert e in slot E - 1 - e, 255 between arrays."""

    module: Any
    form: ExpertForm
    native: dict[str, Any]
    memory: torch.Tensor
    start: int
    slot_bytes: int

    @property
    def address(self) -> int:
        return self.memory.data_ptr() + self.start

    @property
    def slots(self) -> int:
        return E

    def stored(self, expert: int, name: str) -> torch.Tensor:
        [spec] = [each for each in self.form.stored if each.name == name]
        at = self.start + (E - 1 - expert) * self.slot_bytes + self.offsets[name]
        dtype = getattr(torch, spec.dtype)
        return self.memory[at : at + spec.nbytes].clone().view(dtype).view(spec.shape)

    offsets: dict[str, int]

    def weights(self, expert: int) -> dict[str, torch.Tensor]:
        """Its parameters in float64."""
        return {
            param.name: (
                parameter(self.form, param.name, lambda name: self.stored(expert, name))
                if any(matrix.param == param.name for matrix in self.form.matrices)
                else self.stored(expert, param.name)
            ).double()
            for param in self.form.params
        }


def mixtral(hidden: int, intermediate: int) -> Any:
    return MixtralExperts(MixtralConfig(hidden_size=hidden, intermediate_size=intermediate, num_local_experts=E))


def gpt_oss(hidden: int, intermediate: int) -> Any:
    config = GptOssConfig(hidden_size=hidden, intermediate_size=intermediate, num_local_experts=E, swiglu_limit=LIMIT)
    return GptOssExperts(config)


def nemotron_h(hidden: int, intermediate: int) -> Any:
    config = NemotronHConfig(hidden_size=hidden, moe_intermediate_size=intermediate, n_routed_experts=E)
    return NemotronHExperts(config)


def build(
    gate: str, up: str | None = None, down: str | None = None, *, make: Any = mixtral, hidden: int = H, inner: int = I
) -> Expert:
    """Experts whose matrices are encoded; without `up` gate and up lie in one matrix, as the parameter has them."""
    with torch.device("meta"):
        module = make(hidden, inner)
    generator = torch.Generator().manual_seed(1)
    first = "gate_up_proj" if module.has_gate else "up_proj"
    params = tuple(ParamSpec(name, tuple(value.shape[1:]), "float32") for name, value in module.named_parameters())
    rows = inner * (2 if module.has_gate else 1)
    parts = [("first", gate, first, 0, rows)]
    if up is not None:
        parts = [("first", gate, first, 0, inner), ("second", up, first, 1, inner)]
    parts.append(("third", down or gate, "down_proj", 0, hidden))
    stored: list[ParamSpec] = []
    matrices = []
    interleaved = bool(module.is_transposed)
    for key, name, param, turn, count in parts:
        cols = inner if param == "down_proj" else hidden
        how = encoding(name)
        planes = {}
        for plane, shape in how.shapes(count, cols).items():
            planes[plane] = f"{key}.{plane}"
            stored.append(ParamSpec(f"{key}.{plane}", shape, how.plane(plane).dtype))  # type: ignore[union-attr]
        start = 0 if not turn else 1 if interleaved else inner
        step = 2 if interleaved and count == inner and param != "down_proj" else 1
        matrices.append(
            EncodedMatrix(name, count, cols, planes, param, start, step, transposed=bool(module.is_transposed))
        )
    stored += [param for param in params if param.name.endswith("bias")]
    form = ExpertForm(params, tuple(stored), tuple(matrices))
    found = describe(module, form)
    assert found.native is not None, found.reason
    slot_bytes, start = found.nbytes + 3, 1  # odd addresses
    memory = torch.full((start + E * slot_bytes,), 255, dtype=torch.uint8)
    for expert in range(E):
        arrays = {}
        for matrix in matrices:
            made = random_planes(matrix.encoding, matrix.rows, matrix.cols, generator)
            arrays |= {matrix.planes[plane]: array for plane, array in made.items()}
        for spec in stored:
            array = arrays.get(spec.name)
            if array is None:
                array = torch.randn(spec.shape, generator=generator) * 0.3
            at = start + (E - 1 - expert) * slot_bytes + found.offsets[spec.name]
            memory[at : at + spec.nbytes] = array.contiguous().view(torch.uint8).flatten()
    return Expert(module, form, dict(found.native), memory, start, slot_bytes, found.offsets)


def reference(experts: Expert, hidden: torch.Tensor, index: torch.Tensor, routing: torch.Tensor) -> torch.Tensor:
    """[T, H] float64."""
    x, w = hidden.double(), routing.double()
    weights = [experts.weights(e) for e in range(E)]
    out = torch.zeros((len(x), weights[0]["down_proj"].shape[-2 if not experts.module.is_transposed else -1])).double()
    for t, k in np.ndindex(*index.shape):
        of = weights[int(index[t, k])]
        turned = experts.module.is_transposed
        name = "gate_up_proj" if experts.module.has_gate else "up_proj"
        both = (of[name].T if turned else of[name]) @ x[t] + of.get(f"{name}_bias", 0)
        if not experts.module.has_gate:
            h = both.relu().square()
        elif turned:
            gate, up = both[::2].clamp(max=LIMIT), both[1::2].clamp(-LIMIT, LIMIT)
            h = (up + 1) * gate * torch.sigmoid(1.702 * gate)
        else:
            gate, up = both.chunk(2)
            h = torch.nn.functional.silu(gate) * up
        out[t] += w[t, k] * ((of["down_proj"].T if turned else of["down_proj"]) @ h + of.get("down_proj_bias", 0))
    return out


def run(experts: Expert, hidden: torch.Tensor, index: torch.Tensor, routing: torch.Tensor, groups: Any = None) -> Any:
    layout = ops.make_layout(experts.native)
    pairs = torch.zeros((*index.shape, layout.hidden_out))
    for group in groups or [range(E)]:
        slot_of = np.full(E, -1, dtype=np.int32)
        for expert in group:
            slot_of[expert] = E - 1 - expert
        ops.gather_mlp(layout, experts, slot_of, hidden, index, routing, pairs, "pairs")
    return pairs


def inputs(tokens: int, hidden: int = H, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(tokens)
    index = torch.rand((tokens, E), generator=generator).topk(K).indices
    x = torch.randn((tokens, hidden), generator=generator).to(dtype)
    return x, index, torch.rand((tokens, K), generator=generator)


def check(experts: Expert, tokens: int, dtype: torch.dtype = torch.float32) -> None:
    hidden, index, routing = inputs(tokens, experts.native["hidden"], dtype)
    want = reference(experts, hidden, index, routing)
    pairs = run(experts, hidden, index, routing)
    error = (pairs.double().sum(1) - want).abs().max() / want.abs().max()
    # Half rows that meet integers are 16-bit integers, the pairs of many bfloat16 rows bfloat16 (docs/kernels.md).
    most = 1e-5 if dtype == torch.float32 else 8e-3 if dtype == torch.bfloat16 and tokens > 8 else 4e-4
    assert error <= most, f"error {error:.1e}"


def test_the_names_have_every_word_of_codes():
    words = {each.codes for name, each in ENCODINGS.items() if name not in ITEMSIZE}
    words |= {"e4m3", "e5m2", "int8", "uint8b128", "int4", "awq", "gptq", "gptq_v2", "float32", "float16", "bfloat16"}
    assert {encoding(name).codes for name in NAMES} == words


@pytest.mark.parametrize("name", NAMES)
def test_a_row_expands_to_what_the_decoder_says(name):
    rows, cols = (32, 512) if not encoding(name).plane("scales") else (72, 384)
    planes = random_planes(name, rows, cols, torch.Generator().manual_seed(0))
    want = decode(EncodedMatrix(name, rows, cols, {}, ""), planes)
    memory, offsets = [torch.full((1,), 255, dtype=torch.uint8)], {}
    for plane, array in planes.items():
        offsets[plane] = sum(map(len, memory))
        memory += [array.contiguous().view(torch.uint8).flatten(), torch.full((3,), 255, dtype=torch.uint8)]
    slot = torch.cat(memory)
    scales = encoding(name).plane("scales")
    weights = C.Weights(
        codes=encoding(name).codes, rows=rows, depth=cols, first=3, step=4, count=7, planes=offsets,
        scale=encoding(name).scale, scale_block=scales.block if scales else (0, 0),
    )  # fmt: skip
    assert weights.extent == len(slot) - 3
    for row in range(7):
        for first, last in ((0, cols), (31, 33), (255, 257)):
            got = torch.from_numpy(weights.expand(slot.data_ptr(), row, first, last))
            torch.testing.assert_close(got, want[3 + 4 * row, first:last], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("tokens", [1, 5, 40])
@pytest.mark.parametrize("name", NAMES)
def test_experts_of_every_encoding_agree_with_float64(name, tokens):
    check(build(name), tokens)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens", [3, 40])
@pytest.mark.parametrize(
    "name",
    ["q4_0", "q6_k", "q2_k", "q3_k", "iq1_s", "iq1_m", "iq2_xxs", "iq2_xs", "iq2_s", "iq3_xxs", "iq3_s", "mxfp4",
     "e4m3-128x128-float32", "awq-128-float16", "bfloat16"],
)  # fmt: skip
def test_hidden_states_of_two_bytes(name, tokens, dtype):
    check(build(name), tokens, dtype)


@pytest.mark.parametrize("tokens", [2, 40])
def test_gate_up_and_down_may_each_be_another_encoding(tokens):
    check(build("q4_k", "q6_k", "q8_0"), tokens)
    check(build("awq-128-float16", "e4m3-128x128-float32", "bfloat16"), tokens)
    check(build("nvfp4", "float32", "gptq-128-float16"), tokens)


@pytest.mark.parametrize("tokens", [2, 40])
@pytest.mark.parametrize("name", ["mxfp4", "q8_0", "e4m3-row-float32", "gptq-32-float16", "bfloat16"])
def test_interleaved_rows_biases_and_a_clamp(name, tokens):
    check(build(name, make=gpt_oss), tokens)
    check(build(name, name, make=gpt_oss), tokens)


@pytest.mark.parametrize("name", ["q5_0", "int4-32-bfloat16", "awq-64-float16"])
def test_experts_without_a_gate(name):
    for tokens in (2, 40):
        check(build(name, make=nemotron_h), tokens)


@pytest.mark.parametrize("name", ["mxfp4", "q5_1", "iq4_nl", "q8_0", "int4-32-bfloat16", "awq-32-float16"])
def test_sizes_that_are_no_multiple_of_256(name):
    for tokens in (1, 7, 40):
        check(build(name, hidden=2 * 96, inner=160), tokens)


@pytest.mark.parametrize(
    "name", ["int4-32-bfloat16", "int4-16-float16-zeros", "e4m3-128x128-float32", "int8-5x7-float32"]
)
def test_blocks_that_the_edge_cuts(name):
    for tokens in (2, 40):
        check(build(name, hidden=203, inner=77), tokens)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", [*HALVES, "mxfp4", "nvfp4", "e4m3-128x128-float32", "int4-32-bfloat16",
                                  "awq-128-float16", "gptq-128-float16"])  # fmt: skip
def test_the_bits_of_a_token_do_not_depend_on_the_others_nor_on_how_experts_are_spread(name, dtype):
    experts = build(name)
    hidden, index, routing = inputs(8, dtype=dtype)
    want = run(experts, hidden, index, routing)
    assert torch.equal(run(experts, hidden, index, routing, [[e] for e in range(E)]), want)
    for t in range(8):
        one = slice(t, t + 1)
        assert torch.equal(run(experts, hidden[one], index[one], routing[one], [[2, 0], [1]]), want[one])
    many = inputs(40, dtype=dtype)
    assert torch.equal(run(experts, *many, [[e] for e in range(E)]), run(experts, *many))


def test_mode_accumulate_adds_what_pairs_keep_apart():
    experts = build("q4_k")
    hidden, index, routing = inputs(6)
    pairs = run(experts, hidden, index, routing)
    layout, out = ops.make_layout(experts.native), torch.ones((6, H))
    slot_of = np.arange(E, dtype=np.int32)[::-1].copy()
    ops.gather_mlp(layout, experts, slot_of, hidden, index, routing, out, "accumulate")
    torch.testing.assert_close(out, pairs.sum(1) + 1, rtol=1e-5, atol=1e-5)


def weights_of(**changes: Any) -> dict[str, Any]:
    good = {
        "codes": "q4_k", "rows": 64, "depth": 256, "first": 0, "step": 1, "count": 64, "planes": {"blocks": 0},
        "scale": "", "scale_block": (0, 0),
    }  # fmt: skip
    return good | changes


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"codes": "q4_x"}, "q4_x.*q4_k"),
        ({"depth": 320}, "depth=320.*256.*q4_k"),
        ({"count": 65}, "last row is 64"),
        ({"planes": {}}, "need the plane 'blocks'"),
        ({"planes": {"blocks": 0, "scales": 4}}, "no plane 'scales'"),
        ({"planes": {"values": 0, "other": 4}}, "'other' is not one of"),
        ({"codes": "e4m3", "planes": {"codes": 0}}, "need the plane 'scales'"),
        ({"codes": "e4m3", "planes": {"codes": 0, "scales": 9}}, "do not go with scale ''"),
        ({"codes": "e2m1", "planes": {"codes": 0, "scales": 9}, "scale": "e4m3", "scale_block": (1, 16)}, "'factor'"),
        ({"codes": "awq", "planes": {"codes": 0, "scales": 9}, "scale": "float16", "scale_block": (1, 128)}, "'zeros'"),
        ({"scale": "e9m0"}, "'e9m0' is not one of"),
        ({"bias": (0, 1, "int8")}, "bias of int8"),
        ({"planes": {"blocks": -5}}, "-5"),
    ],
)
def test_weights_that_contradict_themselves_are_refused(changes, words):
    C.Weights(**weights_of())
    with pytest.raises(ConfigError, match=words):
        C.Weights(**weights_of(**changes))


def test_matrices_that_do_not_fit_the_expert_are_refused():
    good = build("q4_k").native
    assert C.supports(ops.make_layout(good))
    with pytest.raises(ConfigError, match="gate: depth=256, but hidden=512"):
        ops.make_layout({**good, "gate": weights_of(count=256, rows=256)})
    with pytest.raises(ConfigError, match="up belongs to has_gate"):
        ops.make_layout({name: value for name, value in good.items() if name != "up"})
    experts = build("q4_k")
    experts.slot_bytes -= 200
    with pytest.raises(ConfigError, match="reaches to byte"):
        run(experts, *inputs(1))


@pytest.fixture
def emulated():
    """The native module of the emulation."""
    try:
        return native.load_emulated()
    except BackendUnavailable as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("make", [mixtral, gpt_oss, nemotron_h])
def test_a_gpu_takes_every_encoding_and_says_what_it_does_not(emulated, make):
    for name in NAMES:
        experts = build(name, make=make)
        native = {key: on_gpu(value) if isinstance(value, dict) else value for key, value in experts.native.items()}
        grid = f"its gate is {name}, which a GPU's kernels do not decode" if name[:3] in ("iq1", "iq2", "iq3") else ""
        assert grid in emulated.cuda_refusal(ops.make_layout(native, emulated))
        assert grid or emulated.cuda_refusal(ops.make_layout(native, emulated)) == ""
    odd = ops.make_layout(build("int8-5x7-float32", make=make, hidden=203, inner=77).native, emulated)
    assert "its gate is int8 with rows of length 203; a GPU takes multiples of 8" in emulated.cuda_refusal(odd)


def on_gpu(weights):
    """With arrays at multiples of 64, as slots have them."""
    planes = {plane: at // 64 * 64 for plane, at in weights["planes"].items()}
    bias = {"bias": (weights["bias"][0] // 64 * 64, *weights["bias"][1:])} if "bias" in weights else {}
    return {**weights, "planes": planes, **bias}
