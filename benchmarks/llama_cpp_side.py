"""The side of benchmarks/peers.py that runs llama.cpp, in an environment which has llama-cpp-python and not torch.

Reads requests from its input, a JSON object a line, and answers each with one; peers.py starts it and says what is
measured. Only the standard library, numpy and llama_cpp are used: llama.cpp through its C interface, and for the
products alone ggml's, since llama-cpp-python has no names for it.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

import llama_cpp
import numpy as np
from llama_cpp._ggml import libggml

BATCH = 2048
F32, I32 = 0, 26  # enum ggml_type
TYPES = {"q4_0": 2, "q8_0": 8, "q4_k": 12, "q5_k": 13, "q6_k": 14, "gguf_mxfp4": 39}
LOGGED = []


@llama_cpp.llama_log_callback
def _log(level: int, text: bytes, _: Any) -> None:
    LOGGED.append(text.decode(errors="replace"))


class Model:
    """A file in llama.cpp: one sequence at a time, logits of the last token."""

    def __init__(self, file: str, threads: int, context: int, repack: bool) -> None:
        params = llama_cpp.llama_model_default_params()
        params.load_mode = llama_cpp.LLAMA_LOAD_MODE_MMAP
        params.use_extra_bufts = repack
        self.model = llama_cpp.llama_model_load_from_file(file.encode(), params)
        if not self.model:
            raise RuntimeError(f"llama.cpp does not load {file}: {''.join(LOGGED)[-2000:]}")
        settings = llama_cpp.llama_context_default_params()
        settings.n_ctx, settings.n_batch = context, BATCH
        settings.n_threads = settings.n_threads_batch = threads
        self.context = llama_cpp.llama_init_from_model(self.model, settings)
        if not self.context:
            raise RuntimeError(f"llama.cpp makes no context for {file}: {''.join(LOGGED)[-2000:]}")

    def forget(self) -> None:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.context), True)

    def forward(self, tokens: list[int]) -> float:
        """Seconds."""
        array = (llama_cpp.llama_token * len(tokens))(*tokens)
        started = time.perf_counter()
        code = llama_cpp.llama_decode(self.context, llama_cpp.llama_batch_get_one(array, len(tokens)))
        if code:
            raise RuntimeError(f"llama_decode of {len(tokens)} tokens gave {code}")
        llama_cpp.llama_synchronize(self.context)
        return time.perf_counter() - started

    def logits(self) -> list[float]:
        count = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))
        return list(llama_cpp.llama_get_logits_ith(self.context, -1)[:count])

    def close(self) -> None:
        llama_cpp.llama_free(self.context)
        llama_cpp.llama_model_free(self.model)


class _Tensor(ctypes.Structure):
    """The beginning of struct ggml_tensor."""

    _fields_ = (("type", ctypes.c_int), ("buffer", ctypes.c_void_p))


class _InitParams(ctypes.Structure):
    _fields_ = (("mem_size", ctypes.c_size_t), ("mem_buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool))


_P, _I64, _SIZE, _BOOL, _TEXT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_size_t, ctypes.c_bool, ctypes.c_char_p


def _function(name: str, result: Any, *arguments: Any) -> Callable[..., Any]:
    function = getattr(libggml, name)
    function.restype, function.argtypes = result, arguments
    return function  # type: ignore[no-any-return]


init = _function("ggml_init", _P, _InitParams)
new_tensor_2d = _function("ggml_new_tensor_2d", _P, _P, ctypes.c_int, _I64, _I64)
new_tensor_3d = _function("ggml_new_tensor_3d", _P, _P, ctypes.c_int, _I64, _I64, _I64)
mul_mat_id = _function("ggml_mul_mat_id", _P, _P, _P, _P, _P)
swiglu_split = _function("ggml_swiglu_split", _P, _P, _P, _P)
mul = _function("ggml_mul", _P, _P, _P, _P)
new_graph = _function("ggml_new_graph", _P, _P)
build_forward_expand = _function("ggml_build_forward_expand", None, _P, _P)
nbytes = _function("ggml_nbytes", _SIZE, _P)
free = _function("ggml_free", None, _P)
backend_cpu_init = _function("ggml_backend_cpu_init", _P)
backend_cpu_set_n_threads = _function("ggml_backend_cpu_set_n_threads", None, _P, ctypes.c_int)
backend_get_device = _function("ggml_backend_get_device", _P, _P)
backend_free = _function("ggml_backend_free", None, _P)
dev_backend_reg = _function("ggml_backend_dev_backend_reg", _P, _P)
dev_supports_op = _function("ggml_backend_dev_supports_op", _BOOL, _P, _P)
dev_buffer_type = _function("ggml_backend_dev_buffer_type", _P, _P)
reg_get_proc_address = _function("ggml_backend_reg_get_proc_address", _P, _P, _TEXT)
buft_alloc_buffer = _function("ggml_backend_buft_alloc_buffer", _P, _P, _SIZE)
buft_name = _function("ggml_backend_buft_name", _TEXT, _P)
buffer_free = _function("ggml_backend_buffer_free", None, _P)
alloc_ctx_tensors = _function("ggml_backend_alloc_ctx_tensors_from_buft", _P, _P, _P)
tensor_set = _function("ggml_backend_tensor_set", None, _P, _P, _SIZE, _SIZE)
tensor_get = _function("ggml_backend_tensor_get", None, _P, _P, _SIZE, _SIZE)
graph_compute = _function("ggml_backend_graph_compute", ctypes.c_int, _P, _P)


class Experts:
    """The experts of one layer as llama.cpp builds them: gate and up, silu and product, down, times the weights.

    The weights lie in the buffer that llama.cpp would choose: the first of its extra types (AMX, repacked) that can run
    mul_mat_id on them, else a plain one.
    """

    def __init__(self, kind: str, H: int, I: int, E: int, K: int, T: int, threads: int, repack: bool) -> None:
        self.E, self.K, self.T = E, K, T
        self.backend = backend_cpu_init()
        backend_cpu_set_n_threads(self.backend, threads)
        device = backend_get_device(self.backend)
        self.contexts = [init(_InitParams(1 << 20, None, True)) for _ in range(2)]
        weights, work = self.contexts
        code = TYPES[kind]
        matrices = [new_tensor_3d(weights, code, *shape) for shape in ((H, I, E), (H, I, E), (I, H, E))]
        self.x, self.ids = new_tensor_3d(work, F32, H, 1, T), new_tensor_2d(work, I32, K, T)
        self.factors = new_tensor_3d(work, F32, 1, K, T)
        gate, up = (mul_mat_id(work, each, self.x, self.ids) for each in matrices[:2])
        down = mul_mat_id(work, matrices[2], swiglu_split(work, gate, up), self.ids)
        self.out = mul(work, down, self.factors)
        self.graph = new_graph(work)
        build_forward_expand(self.graph, self.out)
        plain = dev_buffer_type(device)
        chosen = next((each for each in _extra(device) if repack and _runs(device, each, matrices[0], gate)), plain)
        self.where = buft_name(chosen).decode()
        self.buffers = [alloc_ctx_tensors(weights, chosen), alloc_ctx_tensors(work, plain)]
        self.bytes = [nbytes(each) for each in matrices]
        self.matrices, self.shape = matrices, (T, K, H)
        generator = np.random.default_rng(0)
        _set(self.x, generator.standard_normal((T, H), dtype=np.float32))
        _set(self.factors, np.full((T, K), 1 / K, dtype=np.float32))

    def fill(self, files: list[str]) -> None:
        """From files with the raw blocks of gate, up and down."""
        for tensor, file in zip(self.matrices, files, strict=True):
            _set(tensor, np.fromfile(file, dtype=np.uint8, count=nbytes(tensor)))

    def route(self, ids: Any) -> None:
        _set(self.ids, np.ascontiguousarray(ids, dtype=np.int32))

    def compute(self) -> float:
        """Seconds."""
        started = time.perf_counter()
        if graph_compute(self.backend, self.graph):
            raise RuntimeError("ggml could not compute the graph")
        return time.perf_counter() - started

    def result(self) -> Any:
        """[T, K, H]"""
        out = np.empty(self.shape, dtype=np.float32)
        tensor_get(self.out, out.ctypes.data, 0, out.nbytes)
        return out

    def close(self) -> None:
        for buffer in self.buffers:
            buffer_free(buffer)
        for context in self.contexts:
            free(context)
        backend_free(self.backend)


def _set(tensor: int, array: Any) -> None:
    if nbytes(tensor) != array.nbytes:
        raise RuntimeError(f"{array.nbytes} bytes for a tensor of {nbytes(tensor)}")
    tensor_set(tensor, array.ctypes.data, 0, array.nbytes)


def _extra(device: int) -> list[int]:
    address = reg_get_proc_address(dev_backend_reg(device), b"ggml_backend_dev_get_extra_bufts")
    if not address:
        return []
    pointers = ctypes.CFUNCTYPE(ctypes.POINTER(_P), _P)(address)(device)
    found = []
    while pointers[len(found)]:
        found.append(pointers[len(found)])
    return found


def _runs(device: int, buffer_type: int, weight: int, product: int) -> bool:
    """Asked as llama.cpp does, with an empty buffer of that type."""
    buffer = buft_alloc_buffer(buffer_type, 0)
    header = _Tensor.from_address(weight)
    header.buffer = buffer
    runs = bool(dev_supports_op(device, product))
    header.buffer = None
    buffer_free(buffer)
    return runs


class Side:
    """What peers.py can ask for; every method takes and returns what JSON holds."""

    def __init__(self) -> None:
        self.model: Model | None = None
        self.experts: dict[str, Experts] = {}

    def describe(self) -> dict[str, Any]:
        features = llama_cpp.llama_print_system_info().decode()
        return {"version": llama_cpp.__version__, "features": features}

    def load(self, file: str, threads: int, context: int, repack: bool) -> dict[str, Any]:
        self.unload()
        started = time.perf_counter()
        del LOGGED[:]
        self.model = Model(file, threads, context, repack)
        buffers = [line.strip() for line in LOGGED if "model buffer size" in line]
        return {"seconds": time.perf_counter() - started, "buffers": buffers}

    def unload(self) -> dict[str, Any]:
        if self.model is not None:
            self.model.close()
        self.model = None
        return {}

    def prefill(self, tokens: list[int]) -> dict[str, Any]:
        assert self.model is not None
        self.model.forget()
        return {"seconds": self.model.forward(tokens)}

    def decode(
        self, prompt: list[int], tokens: list[int], limit: float = float("inf"), fewest: int = 0
    ) -> dict[str, Any]:
        """Seconds of each token; no further token after `limit` seconds."""
        assert self.model is not None
        self.model.forget()
        self.model.forward(prompt)
        seconds: list[float] = []
        for token in tokens:
            if sum(seconds) > limit and len(seconds) >= fewest:
                break
            seconds.append(self.model.forward([token]))
        return {"seconds": seconds}

    def logits(self, tokens: list[int]) -> dict[str, Any]:
        assert self.model is not None
        self.model.forget()
        self.model.forward(tokens)
        return {"logits": self.model.logits()}

    def make_experts(
        self, name: str, kind: str, sizes: dict[str, int], threads: int, repack: bool, files: list[str]
    ) -> dict[str, Any]:
        experts = Experts(kind, **sizes, threads=threads, repack=repack)
        experts.fill(files)
        self.experts[name] = experts
        return {"buffer": experts.where, "bytes": sum(experts.bytes)}

    def run_experts(self, name: str, ids: list[list[int]], times: int = 1) -> dict[str, Any]:
        experts = self.experts[name]
        experts.route(ids)
        return {"seconds": min(experts.compute() for _ in range(times))}

    def output(self, name: str, token: int) -> dict[str, Any]:
        """[K, H] of the last run."""
        return {"out": self.experts[name].result()[token].tolist()}

    def drop_experts(self, name: str) -> dict[str, Any]:
        self.experts.pop(name).close()
        return {}


def main() -> None:
    # Whatever the library prints goes to stderr: the answers have a descriptor of their own.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    llama_cpp.llama_log_set(_log, None)
    llama_cpp.llama_backend_init()
    side = Side()
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = getattr(side, request.pop("do"))(**request)
        except RuntimeError as error:
            answer = {"error": str(error)}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
