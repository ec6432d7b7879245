"""emoe.ops and the compute side of emoe._C: against Transformers' own eager experts, argument errors, instruction sets.

The arithmetic of every layout is tested natively (csrc/tests/test_kernels.cpp); here it is the meaning of the flags.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from emoe import native
from emoe.compute import ops
from emoe.compute.choose import open_device
from emoe.compute.device import Device
from emoe.errors import ConfigError

ROOT = Path(__file__).parents[2]
C = native.load()
E, H, I, K = 5, 36, 24, 3  # no multiple of any vector


def mixtral() -> Any:
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts

    return MixtralExperts(MixtralConfig(hidden_size=H, intermediate_size=I, num_local_experts=E))


def gpt_oss() -> Any:
    from transformers import GptOssConfig
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

    return GptOssExperts(GptOssConfig(hidden_size=H, intermediate_size=I, num_local_experts=E))


def aria_text() -> Any:
    from transformers import AriaTextConfig
    from transformers.models.aria.modeling_aria import AriaExperts

    return AriaExperts(AriaTextConfig(hidden_size=H, intermediate_size=I, moe_num_experts=E, num_attention_heads=2))


def nemotron_h() -> Any:
    from transformers import NemotronHConfig
    from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts

    return NemotronHExperts(NemotronHConfig(hidden_size=H, moe_intermediate_size=I, n_routed_experts=E))


FAMILIES: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "mixtral": (mixtral, {}),
    "gpt_oss": (gpt_oss, {"transposed": True, "interleaved": True, "activation": "swiglu_clamped", "limit": 7.0}),
    "aria_text": (aria_text, {"transposed": True}),
    "nemotron_h": (nemotron_h, {"has_gate": False, "activation": "relu2"}),
}


@dataclass
class Slots:
    """Experts copied into slots of a slab, expert e in slot E - 1 - e; what lies between them is NaN."""

    memory: torch.Tensor
    slot_bytes: int
    arguments: dict[str, Any]  # of an MlpLayout

    @property
    def layout(self) -> Any:
        return C.MlpLayout(**self.arguments)

    @property
    def address(self) -> int:
        return self.memory.data_ptr()

    @property
    def slots(self) -> int:
        return E


SLOT_OF = np.arange(E, dtype=np.int32)[::-1].copy()


def place(experts: Any, flags: dict[str, Any]) -> Slots:
    params = {name: param.detach() for name, param in experts.named_parameters()}
    dtype = next(iter(params.values())).dtype
    offsets, end = {}, 0
    for name, param in params.items():
        offsets[name] = end
        end += -(-param[0].numel() * dtype.itemsize // 64) * 64
    memory = torch.full((E * end,), 255, dtype=torch.uint8)
    for name, param in params.items():
        for e in range(E):
            start = SLOT_OF[e] * end + offsets[name]
            memory[start : start + param[e].numel() * dtype.itemsize] = param[e].flatten().view(torch.uint8)
    up = "gate_up_proj" if "gate_up_proj" in params else "up_proj"
    arguments: dict[str, Any] = {"has_gate": True, "interleaved": False, "transposed": False, "activation": "silu"}
    arguments |= flags
    arguments |= {"hidden": H, "intermediate": I, "hidden_out": H, "dtype": str(dtype).removeprefix("torch.")}
    arguments |= {"gate_up_offset": offsets[up], "down_offset": offsets["down_proj"]}
    arguments["gate_up_bias_offset"] = offsets.get(f"{up}_bias", -1)
    arguments["down_bias_offset"] = offsets.get("down_proj_bias", -1)
    return Slots(memory, end, arguments)


def experts_of(family: str, dtype: torch.dtype = torch.float32) -> tuple[Any, Slots]:
    build, flags = FAMILIES[family]
    torch.manual_seed(0)
    experts = build()
    for param in experts.parameters():
        torch.nn.init.normal_(param, std=0.3)
    experts.requires_grad_(False).to(dtype)
    return experts, place(experts, flags)


def routing(tokens: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    hidden = torch.randn((tokens, H), generator=generator).to(dtype)
    index = torch.rand((tokens, E), generator=generator).topk(K).indices
    return hidden, index, torch.rand((tokens, K), generator=generator).to(dtype)


Run = Callable[..., torch.Tensor]  # slots, hidden, index, weights, groups of experts: one call each


def slots_of(groups: Any) -> list[np.ndarray]:
    tables = []
    for group in groups or [range(E)]:
        tables.append(np.full(E, -1, dtype=np.int32))
        tables[-1][list(group)] = SLOT_OF[list(group)]
    return tables


def on_cpu(
    slots: Slots, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor, groups: Any = None
) -> torch.Tensor:
    pairs = torch.zeros((*index.shape, H))
    for slot_of in slots_of(groups):
        ops.gather_mlp(slots.layout, slots, slot_of, hidden, index, weights, pairs, "pairs")
    return ops.combine(pairs, hidden.dtype)


def on(device: Device) -> Run:
    def run(
        slots: Slots, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor, groups: Any = None
    ) -> torch.Tensor:
        slab = device.native.slab(E, slots.slot_bytes)
        for slot in range(E):
            source, target = slots.address + slot * slots.slot_bytes, slab.address + slot * slab.slot_bytes
            device.native.upload(target, source, slots.slot_bytes, device.stream())
        place = "cpu" if device.name == "emulated" else device.name
        arguments = [tensor.to(place) for tensor in (hidden, index, weights)]
        with device.call(device.module.MlpLayout(**slots.arguments), slab, *arguments) as call:
            for slot_of in slots_of(groups):
                call.gather(slot_of)
            return call.combine(hidden.dtype).cpu()

    return run


@pytest.fixture(params=["cpu", "emulated", pytest.param("cuda", marks=pytest.mark.gpu)])
def run(request: pytest.FixtureRequest, found_device: Callable[[str], str]) -> Run:
    """The kernels of the CPU and of every device."""
    return on_cpu if request.param == "cpu" else on(open_device(found_device(request.param)))


def eager(experts: Any, *arguments: torch.Tensor) -> torch.Tensor:
    return type(experts).forward.__wrapped__(experts, *arguments)


@pytest.mark.parametrize("tokens", [1, 5, 40])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_layout_flags_mean_what_transformers_computes(run: Run, family: str, tokens: int) -> None:
    experts, slots = experts_of(family)
    arguments = routing(tokens)
    torch.testing.assert_close(run(slots, *arguments), eager(experts, *arguments), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", FAMILIES)
def test_half_precision_is_as_close_to_float32_as_transformers_is(run: Run, family: str, dtype: torch.dtype) -> None:
    experts, slots = experts_of(family, dtype)
    hidden, index, weights = routing(40, dtype)
    exact = eager(experts.float(), hidden.float(), index, weights.float())
    stock = eager(experts.to(dtype), hidden, index, weights).float()
    ours = run(slots, hidden, index, weights).float()
    assert (ours - exact).abs().max() <= (stock - exact).abs().max()


@pytest.mark.parametrize("family", FAMILIES)
def test_accumulating_gives_the_sum_over_pairs(family: str) -> None:
    _, slots = experts_of(family)
    hidden, index, weights = routing(20)
    out = torch.zeros((20, H))
    ops.gather_mlp(slots.layout, slots, SLOT_OF, hidden, index, weights, out, "accumulate")
    torch.testing.assert_close(out, on_cpu(slots, hidden, index, weights), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_token_decodes_to_the_same_bits_alone_in_a_batch_of_8_and_in_any_grouping(
    run: Run, family: str, dtype: torch.dtype
) -> None:
    _, slots = experts_of(family, dtype)
    hidden, index, weights = routing(8, dtype)
    batch = run(slots, hidden, index, weights)
    for groups in ([[e] for e in reversed(range(E))], [[0, 3], [1], [2, 4]]):
        assert torch.equal(run(slots, hidden, index, weights, groups), batch)
    for t in range(8):
        alone = run(slots, hidden[t : t + 1], index[t : t + 1], weights[t : t + 1], [[4, 1], [0, 2, 3]])
        assert torch.equal(alone, batch[t : t + 1])


def test_a_prefill_gives_the_same_bits_in_any_grouping(run: Run) -> None:
    _, slots = experts_of("mixtral", torch.bfloat16)
    arguments = routing(60, torch.bfloat16)
    assert torch.equal(run(slots, *arguments, [[e] for e in range(E)]), run(slots, *arguments))


def test_ids_outside_the_experts_add_nothing(run: Run) -> None:
    experts, slots = experts_of("mixtral")
    hidden, index, weights = routing(6)
    index[:, 0] = torch.tensor([-1, E, E + 7, -(2**40), 2**40, E])
    want = eager(experts, hidden, index[:, 1:], weights[:, 1:])
    torch.testing.assert_close(run(slots, hidden, index, weights), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_sum_has_the_bits_of_its_pairs_combined(dtype: torch.dtype) -> None:
    _, slots = experts_of("mixtral")
    for tokens in (1, 6):
        hidden, index, weights = routing(tokens)
        index[0, 0] = -1
        hidden = hidden.to(dtype)
        out = torch.full((tokens, H), torch.nan, dtype=dtype)
        ops.gather_mlp(slots.layout, slots, SLOT_OF, hidden, index, weights, out, "sum")
        assert torch.equal(out, on_cpu(slots, hidden, index, weights))


def test_no_tokens_are_no_error(run: Run) -> None:
    _, slots = experts_of("mixtral")
    assert run(slots, *routing(0)).shape == (0, H)


def call(**changes: Any) -> None:
    _, slots = experts_of("mixtral")
    hidden, index, weights = routing(4)
    arguments = {
        "layout": slots.layout,
        "slab": slots,
        "slot_of": SLOT_OF,
        "hidden": hidden,
        "index": index,
        "weights": weights,
        "out": torch.zeros((4, K, H)),
        "mode": "pairs",
    }
    ops.gather_mlp(**(arguments | changes))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"mode": "add"}, "mode 'add' is not one of: pairs, accumulate, sum"),
        ({"mode": "sum"}, "out has shape (4, 3, 36), not (4, 36)"),
        ({"hidden": torch.zeros((4, H), dtype=torch.float64)}, "hidden is float64, not one of: float32, float16, bfl"),
        ({"hidden": torch.zeros((4, H + 1))}, "hidden has shape (4, 37), not (4, 36)"),
        ({"hidden": torch.zeros((H, 4)).t()}, "hidden has strides (1, 4): it must be contiguous"),
        ({"hidden": torch.zeros((4, H), device="meta")}, "hidden is on meta, not on the CPU"),
        ({"index": torch.zeros((4, K), dtype=torch.int32)}, "index is int32, not one of: int64"),
        ({"index": torch.zeros(4, dtype=torch.int64)}, "index has shape (4,), not [T, K]"),
        ({"weights": torch.zeros((4, K + 1))}, "weights has shape (4, 4), not (4, 3)"),
        ({"out": torch.zeros((4, H))}, "out has shape (4, 36), not (4, 3, 36)"),
        ({"out": torch.zeros((4, K, H), dtype=torch.bfloat16)}, "out is bfloat16, not one of: float32"),
        ({"slot_of": np.array([5], dtype=np.int32)}, "slot_of names slot 5, but the slab has 5 slots"),
        ({"slot_of": np.array([-2], dtype=np.int32)}, "slot_of[0]=-2"),
        ({"slot_of": np.zeros(E, dtype=np.int64)}, "slot_of is a int64 array of shape (5,), not int32 [E]"),
        ({"slot_of": [0, 1]}, "slot_of is a list, not an int32 numpy array [E]"),
    ],
)
def test_an_argument_that_does_not_fit_is_named_with_its_value(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(says)):
        call(**changes)


def test_a_slot_smaller_than_its_layout_is_refused_with_both_sizes() -> None:
    _, slots = experts_of("mixtral")
    slots.slot_bytes = 100
    with pytest.raises(ConfigError, match=rf"reaches to byte {3 * H * I * 4}, but slots have 100 bytes"):
        on_cpu(slots, *routing(1))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"activation": "swish"}, "activation 'swish' is not one of: silu, gelu, gelu_tanh, relu, relu2, identity"),
        ({"dtype": "fp32"}, "dtype 'fp32' is not one of: float32, float16, bfloat16"),
        ({"hidden": 0}, "hidden=0: must be at least 1"),
        ({"interleaved": True, "has_gate": False}, "interleaved=True needs has_gate=True"),
        ({"activation": "swiglu_clamped"}, "activation 'swiglu_clamped' needs limit > 0"),
        ({"down_offset": -1}, "down_offset=-1: not an offset into a slot"),
    ],
)
def test_a_layout_that_contradicts_itself_names_the_value(changes: dict[str, Any], says: str) -> None:
    layout: dict[str, Any] = {"hidden": H, "intermediate": I, "hidden_out": H, "dtype": "float32", "activation": "silu"}
    layout |= {"has_gate": True, "interleaved": False, "transposed": False, "gate_up_offset": 0, "down_offset": 0}
    assert C.supports(ops.make_layout(layout))
    with pytest.raises(ConfigError, match=re.escape(says)):
        ops.make_layout(layout | changes)


def test_combine_refuses_what_it_cannot_round_to() -> None:
    with pytest.raises(ConfigError, match="dtype 'int64' is not one of: float32, float16, bfloat16"):
        ops.combine(torch.zeros((1, 2, 3)), torch.int64)
    with pytest.raises(ConfigError, match=re.escape("pairs has shape (2, 3), not [T, K, Ho]")):
        ops.combine(torch.zeros((2, 3)), torch.float32)


def test_an_int8_layout_is_not_supported_and_says_so() -> None:
    layout = C.MlpLayout(8, 8, 8, "int8", True, False, False, "silu", gate_up_offset=0, down_offset=128)
    assert not C.supports(layout)


# Decodes one token in a process of its own (the choice is made once), and prints the unit, the output and its bytes.
CHILD = """
import json, sys
import numpy as np
from emoe import _C
try:
    isa = _C.isa()
except Exception as error:
    print(json.dumps({"error": type(error).__name__, "message": str(error)}))
    sys.exit()
H = I = 257
random = np.random.default_rng(0)
slab, x = random.normal(size=3 * H * I).astype("f") * 0.1, random.normal(size=(1, H)).astype("f")
index, weights, out = np.zeros((1, 1), np.int64), np.ones((1, 1), "f"), np.zeros((1, 1, H), "f")
layout = _C.MlpLayout(H, I, H, "float32", True, False, False, "silu", gate_up_offset=0, down_offset=8 * H * I)
_C.gather_mlp(layout, slab.ctypes.data, slab.nbytes, np.zeros(1, np.int32), x.ctypes.data, "float32", 1,
              index.ctypes.data, weights.ctypes.data, "float32", 1, out.ctypes.data, "pairs")
print(json.dumps({"isa": isa, "bytes": out.tobytes().hex()}))
"""


def forced(isa: str) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-c", CHILD],
        env={**os.environ, "EMOE_FORCE_ISA": isa},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_a_forced_instruction_set_is_the_one_that_runs() -> None:
    found = {isa: forced(isa) for isa in C.available_isas()}
    assert {isa: result.get("isa") for isa, result in found.items()} == {isa: isa for isa in found}
    outputs = {isa: np.frombuffer(bytes.fromhex(result["bytes"]), np.float32) for isa, result in found.items()}
    for isa, out in outputs.items():
        np.testing.assert_allclose(out, outputs["scalar"], rtol=0, atol=1e-5 * np.abs(out).max(), err_msg=isa)
    # Other lanes, another order of additions: equal bits would mean that the same unit ran. The two AVX-512 units
    # differ in bfloat16 only.
    lanes = {"avx512bf16": 16, "avx512": 16, "avx2": 8, "scalar": 4}
    assert len({result["bytes"] for result in found.values()}) == len({lanes[isa] for isa in found})


def test_an_unknown_instruction_set_is_refused_with_the_choices() -> None:
    result = forced("sse9")
    assert result["error"] == "ConfigError"
    assert "EMOE_FORCE_ISA='sse9' is not one of: " in result["message"]
    assert "scalar" in result["message"]


def test_an_instruction_set_this_cpu_lacks_is_refused_with_those_it_has() -> None:
    known = forced("sse9")["message"].rpartition(": ")[2].split(", ")
    missing = sorted(set(known) - set(C.available_isas()))
    if not missing:
        pytest.skip(f"this CPU has every instruction set of the build: {', '.join(known)}")
    for isa in missing:
        result = forced(isa)
        assert result["error"] == "BackendUnavailable"
        assert f"EMOE_FORCE_ISA={isa} does not run on this CPU; it has: " in result["message"]


def test_describe_says_what_runs_here() -> None:
    info = native.describe()
    assert info["built"] and "error" not in info
    assert info["isa"] in info["available_isas"] and info["available_isas"][-1] == "scalar"
    assert set(info["readers"]) == {"uring", "pread"}


def test_a_bad_number_of_threads_is_refused_and_a_good_one_kept() -> None:
    before = C.threads()
    try:
        C.set_threads(3)
        assert C.threads() == 3
        with pytest.raises(ConfigError, match=re.escape("set_threads(0): at least 1 thread is needed")):
            C.set_threads(0)
    finally:
        C.set_threads(before)


def _threads_with(**environment: str) -> subprocess.CompletedProcess[str]:
    """What the native module says of its threads in a process of its own, in which torch is never loaded."""
    script = (
        "import emoe; from emoe import _C; print(_C.threads()); assert 'libgomp' not in open('/proc/self/maps').read()"
    )
    kept = {name: value for name, value in os.environ.items() if name not in ("EMOE_THREADS", "OMP_NUM_THREADS")}
    return subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, env={**kept, **environment}
    )


@pytest.mark.parametrize(
    ("environment", "threads"),
    [
        ({}, len(os.sched_getaffinity(0))),
        ({"OMP_NUM_THREADS": "3,2"}, 3),
        ({"OMP_NUM_THREADS": "3", "EMOE_THREADS": "5"}, 5),
        ({"OMP_NUM_THREADS": "3", "EMOE_THREADS": ""}, 3),
    ],
)
def test_threads_are_what_the_environment_says_or_as_many_as_there_are_cpus(environment, threads) -> None:
    done = _threads_with(**environment)
    assert done.returncode == 0, done.stderr
    found = int(done.stdout)
    assert found == threads or (not environment and 1 <= found <= threads)  # fewer where a cgroup has a quota


@pytest.mark.parametrize(
    ("value", "why"),
    [
        ("0", "EMOE_THREADS=0: at least 1 thread is needed"),
        ("-2", "EMOE_THREADS=-2: at least 1 thread is needed"),
        ("2000", "EMOE_THREADS=2000: at most 1024 threads are possible"),
        ("9" * 30, f"EMOE_THREADS={'9' * 30}: at most 1024 threads are possible"),
        ("two", "EMOE_THREADS=two is not a whole number from 1 to 1024"),
        ("2.5", "EMOE_THREADS=2.5 is not a whole number from 1 to 1024"),
    ],
)
def test_a_number_of_threads_in_the_environment_that_makes_no_sense_is_refused(value: str, why: str) -> None:
    done = _threads_with(EMOE_THREADS=value)
    assert done.returncode != 0
    assert f"ConfigError: {why}" in done.stderr


# Torch's OpenMP threads are others than the kernels'; how they wait is settled before torch is loaded, or after.
WAITS = """
import os, sys, threading
exec(sys.argv[1])
import torch
torch.set_num_threads(2)
from emoe import native
native.load()
waits = [os.environ.get(name) for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")]
print(*waits, any(each.name == "emoe-openmp" for each in threading.enumerate()))
"""


@pytest.mark.parametrize(
    ("first", "environment", "expected"),
    [
        ("import emoe", {}, "passive 5000 False"),
        ("import torch", {}, "None None True"),
        ("import emoe", {"OMP_WAIT_POLICY": "active"}, "active None False"),
        ("import torch", {"OMP_WAIT_POLICY": "active"}, "active None False"),
        ("import torch", {"GOMP_SPINCOUNT": "5"}, "None 5 False"),
    ],
)
def test_threads_of_torch_are_asked_to_sleep_unless_the_user_said_how_they_wait(first, environment, expected) -> None:
    kept = {name: value for name, value in os.environ.items() if name not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
    done = subprocess.run(
        [sys.executable, "-c", WAITS, first], capture_output=True, text=True, cwd=ROOT, env={**kept, **environment}
    )
    assert done.stdout.strip() == expected, done.stderr


def test_a_process_that_ends_at_once_ends_well() -> None:
    """It was aborted where a thread that emoe began was still within torch."""
    code = "import torch; torch.set_num_threads(2); from emoe import native; native.load()"
    kept = {name: value for name, value in os.environ.items() if name not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
    for _ in range(4):
        assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=kept).returncode == 0


UNITS = sorted((ROOT / "csrc" / "cpu").glob("kernels_*.cpp"))


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.stem)
def test_an_instruction_set_unit_exports_its_table_and_nothing_weak(unit: Path, tmp_path: Path) -> None:
    """A weak std:: or inline function compiled here could be the copy that a CPU without these instructions runs."""
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
    if compiler is None or shutil.which("nm") is None:
        pytest.skip("needs a C++ compiler and nm")
    cmake = (ROOT / "CMakeLists.txt").read_text()
    flags = re.search(rf'csrc/cpu/{unit.name} PROPERTIES COMPILE_OPTIONS\s+"([^"]*)"', cmake)
    assert flags is not None or unit.stem == "kernels_scalar"
    if flags is not None and platform.machine() != "x86_64":
        pytest.skip(f"{platform.machine()} has no such instructions")
    out = tmp_path / "unit.o"
    # Without optimization nothing is inlined: every function that the unit uses would show.
    command = [
        *compiler.split(),
        "-std=c++20",
        "-O0",
        "-fPIC",
        "-I",
        str(ROOT / "csrc"),
        "-c",
        str(unit),
        "-o",
        str(out),
    ]
    subprocess.run(command + (flags[1].split(";") if flags else []), check=True)
    symbols = subprocess.run(["nm", "-P", str(out)], capture_output=True, text=True, check=True).stdout.splitlines()
    defined = {line.split()[0] for line in symbols if line.split()[1] in "ABCDGRSTVWuvw"}
    wanted = {line.split()[0] for line in symbols if line.split()[1] == "U"}
    assert len(defined) == 1 and "Kernels" in next(iter(defined)), defined
    wanted -= {"erff", "sqrtf", "memcpy", "memset", "memmove", "_GLOBAL_OFFSET_TABLE_"}
    # csrc/cpu/expand.cpp, compiled for the baseline CPU
    assert all(re.match(r"_ZN4emoe3cpu(6expand|7bias_of)E", name) for name in wanted), wanted
