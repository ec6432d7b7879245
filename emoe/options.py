"""Every option once: its name, type, default, check and help.

`from_pretrained`, `wrap`, `plan` and the command line are made from the rows of `Options`. Importing this loads no
arrays. What a value needs of the model or the machine (a file's content, a device) is looked at where it is used.
"""

from __future__ import annotations

import argparse
import difflib
import inspect
import math
import numbers
import re
import textwrap
from collections.abc import Callable, Iterable, Mapping
from dataclasses import Field, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

from emoe.errors import ConfigError, one_line

PREDICTORS = ("recent",)  # those that need no file; emoe.predictor.MADE
LOOK_AHEAD = "look-ahead"
MISSES = ("load", "cpu", "auto")
# What encodings are called that emoe writes: of experts by `emoe convert`, of linear layers as a model is loaded.
FP8 = "e4m3-128x128-float32"
CONVERTED = {**{name: name for name in ("q4_k", "q8_0", "q4_0", "q5_k", "q6_k", "mxfp4", "q3_k", "q2_k")}, "fp8": FP8}
DENSE_ENCODINGS = {name: CONVERTED.get(name, name) for name in ("bfloat16", "q8_0", "q4_0", "mxfp4", "fp8")}
# What a copy of an expert may be (routing coarse): those that kernels take fast, the names of encodings of 32 columns
# whose last group may be cut among them.
COPIES = {
    "int4": "int4-32-bfloat16", "int8": "int8-1x32-bfloat16",
    **{name: name for name in CONVERTED if name != "fp8"},
}  # fmt: skip
CONVERTED_REST = ("keep", "q8_0")  # what becomes of linear layers outside experts
EXACT_MASS = 1.0  # none is read where none is asked for: more bits buy more than reads (docs/quality.md)
DEFAULT_TASK = "default"  # key of the bias for tasks that a mapping does not name

Bias = float | Mapping[str, float]

_UNITS = {
    "": 1,
    "B": 1,
    **{f"{prefix}B": 1000**power for power, prefix in enumerate("KMGT", start=1)},
    **{f"{prefix}iB": 1024**power for power, prefix in enumerate("KMGT", start=1)},
    # A letter alone is binary, as control groups, containers and the JVM read it.
    **{prefix: 1024**power for power, prefix in enumerate("KMGT", start=1)},
}
_BY_LOWER = {unit.lower(): size for unit, size in _UNITS.items()}
_AMOUNT = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", re.IGNORECASE | re.ASCII)
_PERCENT = re.compile(r"\s*(\d+(?:\.\d+)?)\s*%\s*", re.ASCII)
_UNIT_NAMES = "units B, KB, MB, GB, TB, and KiB, MiB, GiB, TiB, or K, M, G, T for the same"
_BYTES = f'bytes as an int or text ("8GiB", "500MB"; {_UNIT_NAMES})'
_CHOICES = f'{_BYTES}, a float in (0, 1] or "25%" as a share of the routed experts, or "auto"'


@dataclass(frozen=True)
class Budget:
    """A memory budget as the user meant it.

    Attributes:
        kind: "bytes": `nbytes` counts; "fraction": `share` of the routed experts counts; "auto": neither.
        nbytes: bytes, 0 unless kind is "bytes".
        share: in (0, 1], 0.0 unless kind is "fraction".
    """

    kind: Literal["bytes", "fraction", "auto"]
    nbytes: int = 0
    share: float = 0.0


def parse_budget(value: Any, name: str = "memory_budget") -> Budget:
    """Reads a budget.

    Args:
        value: "8GiB", "8G" (the same), "500MB", "1048576", an int of bytes, a float in (0, 1] or "25%", or "auto".
        name: of the option, for the error.

    Raises:
        ConfigError: anything else; names the value and the choices.
    """
    refusal = ConfigError(f"{name}={value!r} is not one of: {_CHOICES}")
    plain = _plain(value)
    if isinstance(plain, int) and not isinstance(plain, bool):
        if not 1 <= plain < 1 << 128:
            raise refusal
        return Budget("bytes", nbytes=plain)
    if isinstance(plain, float):
        if not 0 < plain <= 1:
            raise refusal
        return Budget("fraction", share=plain)
    if isinstance(plain, str):
        if plain.strip().lower() == "auto":
            return Budget("auto")
        percent = _PERCENT.fullmatch(plain)
        if percent and 0 < float(percent[1]) <= 100:
            return Budget("fraction", share=float(percent[1]) / 100)
        found = _AMOUNT.fullmatch(plain)
        unit = _BY_LOWER.get(found[2].lower()) if found else None
        if found and unit and (found[2] or "." not in found[1]):  # "0.5" alone is no number of bytes
            nbytes = _scale(found[1], unit)
            if nbytes >= 1:
                return Budget("bytes", nbytes=nbytes)
    raise refusal


def _scale(number: str, unit: int) -> int:
    if len(number) > 40:  # longer than any memory, and Python refuses to read thousands of digits
        return 0
    whole, _, part = number.partition(".")
    return int(whole) * unit + (int(part) * unit // 10 ** len(part) if part else 0)


def _plain(value: Any) -> Any:
    """Numbers of other libraries (np.int64, np.float32, Fraction) as Python's own; all else, bool too, as it is."""
    if isinstance(value, bool):
        return value
    if isinstance(value, numbers.Integral):
        return int(value)
    try:
        return float(value) if isinstance(value, numbers.Real) else value
    except OverflowError:
        return math.inf


# Checks: (name, value) -> the value as it is used; ConfigError with the value and the choices.

Check = Callable[[str, Any], Any]


@dataclass(frozen=True)
class OneOf:
    """The value is one of these texts, or a function where that will do."""

    choices: tuple[str, ...]
    or_function: bool = False

    def __call__(self, name: str, value: Any) -> Any:
        if self.or_function and callable(value):
            return value
        if not isinstance(value, str) or value not in self.choices:
            close = difflib.get_close_matches(str(value), self.choices, 1)
            meant = f"; did you mean {close[0]!r}?" if close else ""
            raise ConfigError(f"{name}={value!r} is not one of: {', '.join(self.choices)}{meant}")
        return value


def _budget(name: str, value: Any) -> int | float | str:
    plain: int | float | str = _plain(value)
    parse_budget(plain, name)
    return plain


def _bytes(name: str, value: Any) -> int | str | None:
    plain: int | str | None = _plain(value)
    if plain is None:
        return None
    try:
        if parse_budget(plain, name).kind == "bytes":
            return plain
    except ConfigError:
        pass
    raise ConfigError(f"{name}={value!r} is not one of: {_BYTES}, or None")


def _whole(name: str, value: Any) -> int:
    plain = _plain(value)
    if isinstance(plain, bool) or not isinstance(plain, int) or plain < 1:
        raise ConfigError(f"{name}={value!r} is not a whole number of at least 1")
    return plain


def _chunk(name: str, value: Any) -> int | str | None:
    plain = _plain(value)
    if plain is None or plain == "auto":
        return plain
    if isinstance(plain, bool) or not isinstance(plain, int) or plain < 0:
        raise ConfigError(
            f"{name}={value!r} is not one of: 'auto', a number of tokens of at least 1, None or 0 for all at once"
        )
    return plain or None


def _period(name: str, value: Any) -> int | str:
    plain = _plain(value)
    if plain == "adaptive" or (isinstance(plain, int) and not isinstance(plain, bool) and plain >= 1):
        return plain
    raise ConfigError(f"{name}={value!r} is not a number of requests of at least 1, nor 'adaptive'")


def _number(name: str, value: Any, most: float, choices: str, *, over: bool = False) -> float:
    plain = _plain(value)
    number = not isinstance(plain, bool) and isinstance(plain, (int, float))
    if not number or not 0 <= plain <= most or (over and plain == 0):
        raise ConfigError(f"{name}={value!r} is not {choices}")
    return float(plain)


def _share(name: str, value: Any) -> float:
    return _number(name, value, 1.0, "a share over 0 and up to 1", over=True)


def _mass(name: str, value: Any) -> float | None:
    return None if value is None else _number(name, value, 1.0, "a share of router mass from 0 to 1")


def _bias(name: str, value: Any) -> Bias | None:
    return _by_task(name, value, math.inf, "a number of at least 0 (inf: resident experts first)")


def _exact_mass(name: str, value: Any) -> Bias | None:
    return _by_task(name, value, 1.0, "a share of router mass from 0 (all are read) to 1 (none is)")


def _by_task(name: str, value: Any, most: float, choices: str) -> Bias | None:
    """One number from 0 to `most`, or one for each task."""
    if value is None:
        return None
    if not isinstance(value, Mapping):
        return _number(name, value, most, choices)
    for task in value:
        if not isinstance(task, str):
            raise ConfigError(f"{name} has the key {task!r}; keys are names of tasks, and 'default' for all others")
    return {task: _number(f"{name}[{task!r}]", each, most, choices) for task, each in value.items()}


@dataclass(frozen=True)
class DType(OneOf):
    """A name or a torch.dtype; torch's short names, too."""

    def __call__(self, name: str, value: Any) -> Any:
        text = "auto" if value is None else str(value).removeprefix("torch.")
        short = {"half": "float16", "float": "float32", "double": "float64"}
        return super().__call__(name, short.get(text, text))


_DEVICE = re.compile(r"cpu(:0)?|emulated|cuda(:\d+)?", re.ASCII)
DEVICES = "cpu, cuda, cuda:0, cuda:1, ..., emulated (tests)"


def _device(name: str, value: Any) -> str:
    """Takes a torch.device, too, and a number as Transformers does: that GPU."""
    plain = _plain(value)
    text = f"cuda:{plain}" if isinstance(plain, int) and not isinstance(plain, bool) else str(value)
    if not _DEVICE.fullmatch(text):
        raise ConfigError(f"{name}={text!r} is not one of: {DEVICES}")
    return text.removesuffix(":0") if text.startswith("cpu") else text


@dataclass(frozen=True)
class Given:
    """A file, one of some names, or an object with a method; None for nothing."""

    method: str
    maker: str  # what writes such files
    names: tuple[str, ...] = ()

    def __call__(self, name: str, value: Any) -> Any:
        if value is None:
            return None
        if not isinstance(value, (str, Path)):
            if not hasattr(value, self.method):
                raise ConfigError(
                    f"{name}: {type(value).__name__} has no method {self.method}(); docs/predictors.md and "
                    "docs/tasks.md say what has"
                )
            return value
        if str(value) in self.names:
            return str(value)
        path = _path(name, value)
        if not path.is_file():
            what = f"neither a file nor one of: {', '.join(self.names)}" if self.names else "not a file"
            raise ConfigError(f"{name}={str(value)!r} is {what}; '{self.maker}' makes files")
        return path


def _path(name: str, value: str | Path) -> Path:
    """Of something that may be there."""
    try:
        path = Path(value).expanduser()
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return path
    except (OSError, ValueError, RuntimeError) as error:  # a name that is too long, a zero byte, nobody's home
        raise ConfigError(f"{name}={str(value)!r:.80} is no path: {error}"[:300]) from error
    return path


def _store(name: str, value: Any) -> str | Path | None:
    if value is None or value == "ram":
        return value
    if not isinstance(value, (str, Path)) or str(value) == "":
        raise ConfigError(f"{name}={value!r} is not a folder, 'ram', or None for a temporary folder")
    path = _path(name, value)
    if path.exists() and not path.is_dir():
        raise ConfigError(f"{name}={str(value)!r} is a file; give a folder, 'ram', or None for a temporary folder")
    return path


# Reading from the command line: text -> what a check takes.


def _text_number(text: str) -> Any:
    """A whole number, a fraction, or a percentage as a share; other text as it is."""
    text = text.strip()
    if re.fullmatch(r"\d{1,40}", text, re.ASCII):
        return int(text)
    if percent := _PERCENT.fullmatch(text):
        return float(percent[1]) / 100
    try:
        return float(text) if re.fullmatch(r"[-+.\de]+|inf", text, re.ASCII) else text
    except ValueError:
        return text


def _text_bias(text: str) -> Any:
    """One number, or one per task: code=0.2,default=0.5."""
    if "=" not in text:
        return _text_number(text)
    pairs = (part.partition("=") for part in text.split(","))
    return {task.strip(): _text_number(number) for task, _, number in pairs}


@dataclass(frozen=True)
class Row:
    """What is known of an option beside its name, type and default.

    Attributes:
        check: the value as it is used, or ConfigError.
        help: for documentation and `--help`.
        metavar: what stands for the value in `--help`.
        read: text of the command line -> what `check` takes.
        ways: where it is an option: "load" (from_pretrained, `emoe run`), "wrap", "plan" (what changes bytes).
    """

    check: Check
    help: str
    metavar: str
    read: Callable[[str], Any]
    ways: tuple[str, ...]


def _row(
    default: Any,
    check: Check,
    help: str,
    metavar: str = "",
    *,
    read: Callable[[str], Any] = str,
    ways: tuple[str, ...] = ("load", "wrap"),
) -> Any:
    return field(default=default, metadata={"row": Row(check, " ".join(help.split()), metavar, read, ways)})


@dataclass(frozen=True, kw_only=True)
class Options:
    """How a model runs. Making one checks every value; `rows` says what each is.

    Raises:
        ConfigError: a value is not one of its choices, or does not go with another.
    """

    memory_budget: int | str | float = _row(
        "auto", _budget,
        """everything the model takes (other weights, expert slots, staging, and for `context` tokens times `batch` the
        KV cache and a prompt's activations): bytes ("8GiB", "8G" for the same, "500MB", a whole number), a share of the
        routed experts (0.25 or 25%), or "auto" for what is free now less a reserve, which is logged. From 256 MiB on it
        covers all that a process takes over `import torch, transformers`, with 128 MiB for libraries""",
        "BYTES", read=_text_number, ways=("load", "wrap", "plan"),
    )  # fmt: skip
    dtype: Any = _row(
        "auto", DType(("auto", "float32", "bfloat16", "float16", "float64")),
        "of the weights in memory; auto is the checkpoint's own", "TYPE", ways=("load", "plan"),
    )  # fmt: skip
    context: int = _row(
        2048, _whole, "tokens of KV cache that the budget leaves room for, per sequence", "TOKENS", read=_text_number,
        ways=("load", "wrap", "plan"),
    )  # fmt: skip
    batch: int = _row(
        1, _whole, "sequences that run at once", "N", read=_text_number, ways=("load", "wrap", "plan")
    )  # fmt: skip
    prefill_chunk: int | str | None = _row(
        "auto", _chunk,
        """tokens of each sequence that a long prompt is computed in at once; their activations are in the budget. auto
        is the most that fits an allowance from the model's size, 0 (or None) the whole prompt at once""",
        "TOKENS", read=_text_number, ways=("load", "wrap", "plan"),
    )  # fmt: skip
    kernels: str = _row(
        "native", OneOf(("native", "stock")),
        "emoe's own, or Transformers' eager loop on the slots, slow and bit-equal to it (prompts in one chunk)",
        ways=("load", "wrap", "plan"),
    )  # fmt: skip
    dense: str = _row(
        "auto", OneOf(("auto", "native", "torch")),
        """who computes linear layers and embeddings outside experts: native emoe's kernels, on weights that a
        checkpoint has encoded as they lie, and on plain ones; torch, for which encoded ones are decoded; auto is native
        for encoded ones, for plain ones whichever is faster on this CPU (docs/kernels.md), and torch for all on a GPU
        or with kernels stock""",
        ways=("load", "wrap", "plan"),
    )  # fmt: skip
    attention: str = _row(
        "auto", OneOf(("auto", "torch")),
        """who computes the attention of one token over its KV cache where a model's attention is sdpa: auto emoe's
        kernel on the CPU, unless kernels are stock; torch Transformers' own""",
    )  # fmt: skip
    norms: str = _row(
        "auto", OneOf(("auto", "torch")),
        """who computes RMSNorms: auto emoe's kernel on the CPU, unless kernels are stock; torch Transformers' own""",
    )  # fmt: skip
    dense_encoding: str = _row(
        "keep", OneOf(("keep", *DENSE_ENCODINGS)),
        """what plain linear layers outside experts become when they are loaded, for the native kernels; layers with an
        output for each expert, such as routers, stay as they are""",
        ways=("load", "plan"),
    )  # fmt: skip
    routing: str = _row(
        "exact", OneOf(("exact", "resident", "biased", "coarse")),
        """what happens to a routed expert that is not in memory: exact reads it first, resident takes the router's next
        choice in memory, biased prefers those in memory by `bias` and reads what is still routed, coarse computes a
        copy of it in few bits, which stays in memory (docs/routing.md)""",
        ways=("load", "wrap", "plan"),
    )  # fmt: skip
    bias: Bias | None = _row(
        None, _bias,
        """for routing biased, in ranges of the router's selection key: 0 is exact, inf is resident; a number, or one
        per task ({"code": 0.2, "default": 0.5}; on the command line code=0.2,default=0.5)""",
        "B", read=_text_bias,
    )  # fmt: skip
    max_substituted_mass: float | None = _row(
        None, _mass,
        """for routing resident and biased: the largest mean share of router mass that may be substituted in a request's
        prompt, and in its answer (0.02 or, on the command line, 2%); beyond it experts are read""",
        "SHARE", read=_text_number,
    )  # fmt: skip
    top_pick: str = _row(
        "auto", OneOf(("auto", "keep", "replace")),
        """for routing resident and biased: the pick of a row with most router mass. keep reads its expert where that is
        not in memory, replace substitutes it like others; auto keeps it under max_substituted_mass while tokens are
        decoded, and not in prompts, where every expert is some row's""",
    )  # fmt: skip
    coarse: str = _row(
        "auto", OneOf(("auto", *COPIES)),
        """for routing coarse: what the copies of all experts are encoded in; they are in the budget, and full experts
        have the slots that are left. auto is what the budget has room for beside slots""",
        ways=("load", "wrap", "plan"),
    )  # fmt: skip
    exact_mass: Bias | None = _row(
        None, _exact_mass,
        """for routing coarse: the share of a row's router mass from which an expert that is not in memory is read first
        while tokens are decoded: 0 reads all, as exact does, 1 none; a number, or one per task ({"code": 0.1,
        "default": 0.25}; on the command line code=0.1,default=25%)""",
        "SHARE", read=_text_bias, ways=("load", "wrap", "plan"),
    )  # fmt: skip
    policy: Any = _row(
        "next-use", OneOf(("lru", "lfu", "lfru", "classlru", "next-use"), or_function=True),
        "which expert leaves when a slot is needed (docs/slots.md)",
    )  # fmt: skip
    predictor: Any = _row(
        None, Given("rank", "emoe train-predictor", PREDICTORS),
        """what chooses the experts to keep (docs/slots.md): a file of `emoe train-predictor`, "recent", which needs
        none, or an `emoe.ExpertPredictor`; none: the policy alone""",
        "FILE",
    )  # fmt: skip
    period: int | str = _row(
        40, _period,  # arXiv 2503.06823
        """requests between two choices of a predictor, or "adaptive": when observed routing drifts""",
        "N", read=_text_number,
    )  # fmt: skip
    slack: float = _row(
        0.5, _share,  # docs/tasks.md: what misnamed tasks cost
        "share of a layer's slots that a predictor leaves to the policy, at least one token's; not used in resident",
        "SHARE", read=_text_number,
    )  # fmt: skip
    prefetch: Any = _row(
        None, Given("next_layer", "emoe train-predictor", (LOOK_AHEAD,)),
        """what names experts of the next layer, which are read while one computes: "look-ahead", or a file or predictor
        that has `next_layer`""",
        "FILE",
    )  # fmt: skip
    sensitivity: Any = _row(
        None, Given("insensitive", "emoe profile sensitivity"),
        """how much layers matter to a task: where they do not, it does not count for a predictor, and
        max_substituted_mass is spent where they matter least; a file of `emoe profile sensitivity`, or a
        `SensitivityProfile`""",
        "FILE",
    )  # fmt: skip
    reader: str = _row("auto", OneOf(("auto", "uring", "pread")), "how bytes are read from disk")
    device: str = _row(
        "cpu", _device,
        """where the model runs: "cpu", or "cuda" or "cuda:1": model and slots are in that GPU's memory, which the
        budget then counts, and experts come through pinned memory of the host (docs/cuda.md)""",
        "DEVICE",
    )  # fmt: skip
    pinned_memory: int | str | None = _row(
        None, _bytes,
        """with a GPU: bytes of pinned host memory in front of the disk; none: room for every expert, or half of the
        host memory that is free where that is less""",
        "BYTES", read=_text_number,
    )  # fmt: skip
    miss: str = _row(
        "load", OneOf(MISSES),
        """with a GPU, a routed expert without a slot: load moves it, cpu computes it on the CPU from pinned memory,
        auto does what is sooner done; with cpu and auto results depend on the budget""",
    )  # fmt: skip
    store: str | Path | None = _row(
        None, _store,
        """a folder for the experts (kept by you), none for a temporary folder, or "ram" for anonymous memory""",
        ways=("wrap",),
    )  # fmt: skip

    def __post_init__(self) -> None:
        for name, (_, row) in rows().items():
            object.__setattr__(self, name, row.check(name, getattr(self, name)))
        if self.max_substituted_mass is not None and self.routing in ("exact", "coarse"):
            raise ConfigError(
                f"max_substituted_mass goes with routing='resident' or 'biased'; {self.routing!r} substitutes nothing"
            )
        if self.top_pick != "auto" and self.routing not in ("resident", "biased"):
            raise ConfigError(
                f"top_pick={self.top_pick!r} goes with routing='resident' or 'biased', not {self.routing!r}"
            )
        if self.routing == "coarse":
            self._check_coarse()
        elif self.coarse != "auto" or self.exact_mass is not None:
            given = f"coarse={self.coarse!r}" if self.coarse != "auto" else f"exact_mass={self.exact_mass!r}"
            raise ConfigError(f"{given} goes with routing='coarse', not {self.routing!r}")
        if self.dense == "native" and self.device != "cpu":
            raise ConfigError(
                f"dense='native' computes on the CPU; device={self.device!r} takes dense='auto' or 'torch'"
            )
        if self.dense_encoding != "keep" and not self.keeps_encoded:
            raise ConfigError(
                f"dense_encoding={self.dense_encoding!r} is for the native kernels on the CPU; it goes with "
                "dense='native', or 'auto' and kernels='native', and device='cpu'"
            )
        if self.bias is not None and self.routing != "biased":
            raise ConfigError(f"bias={self.bias!r} goes with routing='biased', not {self.routing!r}")
        if self.routing == "biased" and self.bias is None and self.max_substituted_mass is None:
            raise ConfigError(
                "routing='biased' needs bias= (a number of at least 0, or one per task: {'code': 0.2, 'default': 0.5}) "
                "or max_substituted_mass= (then the bias is found while running)"
            )

    def _check_coarse(self) -> None:
        if self.device != "cpu":
            raise ConfigError(
                f"routing='coarse' computes copies on the CPU; device={self.device!r} takes routing='exact', "
                "'resident' or 'biased'"
            )
        if self.kernels != "native":
            raise ConfigError(f"routing='coarse' computes copies with kernels='native', not {self.kernels!r}")

    @property
    def exact_masses(self) -> Mapping[str, float]:
        """`exact_mass` by task, with an entry for "default"."""
        mass = EXACT_MASS if self.exact_mass is None else self.exact_mass
        return {DEFAULT_TASK: EXACT_MASS, **(mass if isinstance(mass, Mapping) else {DEFAULT_TASK: mass})}

    @property
    def keeps_top(self) -> tuple[bool, bool]:
        """Whether a row's pick with the most mass is never substituted, in prompts and in decode."""
        keep = self.top_pick == "keep"
        return keep, keep or (self.top_pick == "auto" and self.max_substituted_mass is not None)

    @property
    def keeps_encoded(self) -> bool:
        """Whether weights outside experts that are encoded stay so."""
        return self.dense == "native" or (self.dense == "auto" and self.kernels == "native" and self.device == "cpu")

    @property
    def attends(self) -> bool:
        """Whether emoe's kernel computes the attention of one token."""
        return self.attention == "auto" and self.kernels == "native" and self.device == "cpu"

    @property
    def normalizes(self) -> bool:
        """Whether emoe's kernel computes RMSNorms."""
        return self.norms == "auto" and self.kernels == "native" and self.device == "cpu"

    @property
    def dense_plain(self) -> str | None:
        """The encoding that plain linear layers get; None: they stay as they are."""
        return DENSE_ENCODINGS.get(self.dense_encoding)

    @classmethod
    def split(cls, given: Mapping[str, Any], way: str) -> tuple[Options, dict[str, Any]]:
        """Options among keywords, and the other keywords.

        Args:
            way: options of other ways are among the others.

        Raises:
            ConfigError: as making one; or device= and device_map= name two devices.
        """
        own = {name: given[name] for name in rows(way) if name in given}
        rest = {name: value for name, value in given.items() if name not in own}
        if way != "wrap" and rest.get("device_map") is not None:
            device = one_device(rest.pop("device_map"))
            if own.setdefault("device", device) != device and _device("device", own["device"]) != device:
                raise ConfigError(f"device={own['device']!r} and device_map={device!r} name two devices; give one")
        return cls(**own), rest

    def but(self, **changes: Any) -> Options:
        """With other values for some."""
        return replace(self, **changes)


def rows(way: str | None = None) -> dict[str, tuple[Field[Any], Row]]:
    """Field and row of each option of a way, in their order; None for all."""
    found = {each.name: (each, each.metadata["row"]) for each in fields(Options)}
    return {name: both for name, both in found.items() if way is None or way in both[1].ways}


def one_device(device_map: Any) -> str:
    """The device that a `device_map` of Transformers names: "cpu", {"": 0}, torch.device("cuda", 1).

    Raises:
        ConfigError: it names several, or none ("auto").
    """
    named = list(device_map.values()) if isinstance(device_map, Mapping) else [device_map]
    try:
        found = {_device("device_map", each) for each in named}
    except ConfigError:
        found = set()
    if len(found) != 1:
        raise ConfigError(
            f"device_map={device_map!r} does not name one device; emoe runs a model on one of: {DEVICES} (device=), "
            "and memory_budget= says how much of its memory"
        )
    return found.pop()


def unknown_option(name: str, way: str, others: Iterable[str] = ()) -> ConfigError:
    """A refusal that names the nearest option of a way or other name, or all options."""
    close = difflib.get_close_matches(name, [*rows(way), *others], 1, cutoff=0.7)
    meant = f"did you mean {close[0]!r}?" if close else f"options are: {', '.join(rows(way))}"
    return ConfigError(f"there is no option {name!r}; {meant}")


# What is made from the table.

F = TypeVar("F", bound=Callable[..., Any])


def takes(way: str) -> Callable[[F], F]:
    """Shows the options of a way in the signature and, for "{options}", in the docstring of a function of **given."""

    def show(function: F) -> F:
        signature = inspect.signature(function)
        shown = [each for each in signature.parameters.values() if each.kind is not inspect.Parameter.VAR_KEYWORD]
        others = [each for each in signature.parameters.values() if each.kind is inspect.Parameter.VAR_KEYWORD]
        own = {name: both for name, both in rows(way).items() if name not in signature.parameters}
        made = [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=each.default, annotation=each.type)
            for name, (each, _) in own.items()
        ]
        if way == "wrap":
            others = []  # it hands nothing on
        function.__signature__ = signature.replace(parameters=[*shown, *made, *others])  # type: ignore[attr-defined]
        lines = (_paragraph(name, row) for name, (_, row) in rows(way).items())
        function.__doc__ = (function.__doc__ or "").replace("{options}", "\n".join(lines).lstrip())
        return function

    return show


def _paragraph(name: str, row: Row) -> str:
    choices = getattr(row.check, "choices", ())
    text = row.help + (f" ({', '.join(choices)})." if choices else ".")
    return textwrap.fill(
        f"{name}: {text}", 120, initial_indent=" " * 8, subsequent_indent=" " * 12, break_on_hyphens=False
    )


def add_arguments(parser: Any, names: Iterable[str], **defaults: Any) -> None:
    """Gives a parser or group of argparse these options: --memory-budget for memory_budget.

    Args:
        defaults: other ones than in the table; None where the command finds out what is needed.
    """
    for name in names:
        each, row = rows()[name]
        choices = getattr(row.check, "choices", None)
        default = defaults.get(name, each.default)
        notes = [f"choices: {', '.join(choices)}"] if choices else []
        if default is None and each.default is not None:
            notes.append(f"default: {each.default}, more where it is needed")
        notes += [] if default is None else [f"default: {default}"]
        text = row.help.replace("`", "'") + (f" ({'; '.join(notes)})" if notes else "")
        parser.add_argument(
            "--" + name.replace("_", "-"),
            default=default,
            type=_reader(name, row),
            metavar=row.metavar or name.rpartition("_")[2].upper(),
            help=text.replace("%", "%%"),
        )


def _reader(name: str, row: Row) -> Callable[[str], Any]:
    """An argparse type of an option: what its check takes, checked."""

    def read(text: str) -> Any:
        try:
            return row.check(name, row.read(text))
        except ConfigError as error:
            raise argparse.ArgumentTypeError(one_line(error)) from None

    return read
