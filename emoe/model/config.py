"""What a checkpoint's config says, with the values that a caller gives in its place; read once for plan and model.

And what Transformers' `from_pretrained` may be told beside it: options that emoe cannot keep are refused by name.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from emoe.errors import CheckpointError, ConfigError, one_line
from emoe.files import jsontext
from emoe.model.gguf_files import gguf_config, gguf_files, read_headers, stored_dtype
from emoe.options import one_device, unknown_option

# Where Transformers looks for files; for the config as for the weights.
PLACES = (
    "cache_dir", "code_revision", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token",
    "trust_remote_code",
)  # fmt: skip
# What Transformers' from_pretrained takes itself, and auto_class; every other name is a value of the config.
_TAKEN = (
    "adapter_kwargs", "adapter_name", "auto_class", "allow_all_kernels", "attn_implementation", "config", "device_map",
    "generation_config", "gguf_file", "kernel_config", "low_cpu_mem_usage", "offload_buffers", "offload_state_dict",
    "tqdm_class", "use_kernels", "use_safetensors", "variant", "weights_only",
)  # fmt: skip
MOST_LAYERS = 512  # a model of more would be planned for minutes; published ones have up to 130
_QUANTIZES_NONE = "emoe reads quantized checkpoints as their files say, and quantizes nothing while it loads"
# Those that contradict keeping experts elsewhere, and what to do instead.
_REFUSED = {
    "quantization_config": _QUANTIZES_NONE,
    "state_dict": "emoe reads the checkpoint itself",
    "key_mapping": "emoe finds experts through Transformers' own mapping",
    "max_memory": "memory_budget says what may be used",
    "offload_folder": "experts stay in the checkpoint",
    "tp_plan": "emoe runs on one device",
    "tp_size": "emoe runs on one device",
    "device_mesh": "emoe runs on one device",
    "distributed_config": "emoe runs on one device",
    "experts_implementation": "emoe is the implementation; kernels='stock' runs Transformers' own",
    "output_loading_info": "a checkpoint that does not fit is an error here",
    "ignore_mismatched_sizes": "a checkpoint that does not fit is an error here",
    "load_in_8bit": _QUANTIZES_NONE,
    "load_in_4bit": _QUANTIZES_NONE,
    "torch_dtype": "it is called dtype",
    "return_unused_kwargs": "an unknown option is an error here",
}


def read_config(path_or_id: str | Path, given: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The config of a checkpoint, and what is left for Transformers' `from_pretrained` beside `config=`.

    Args:
        path_or_id: folder or hub id.
        given: keywords as a caller gives them: places of files, values of the config (num_hidden_layers=2), `config` as
            an object, a folder or a JSON file, and others of Transformers. What is returned may be given again.

    Raises:
        ConfigError: an option that emoe cannot keep, or that nobody knows; names what to do, or the nearest name.
        CheckpointError: there is no such folder, or no config in it that Transformers can read.
        UnsupportedModelError: the checkpoint is of another format.
    """
    for name, value in given.items():
        if name in _REFUSED and value is not None:
            raise ConfigError(f"{name}={value!r} is no option here: {_REFUSED[name]}")
    if given.get("device_map") is not None and one_device(given["device_map"]) != "cpu":
        raise ConfigError(f"device_map={given['device_map']!r} is no option here: device= says where a model runs")
    config = given.get("config")
    places = {name: given[name] for name in PLACES if given.get(name) is not None}
    places["trust_remote_code"] = bool(given.get("trust_remote_code"))  # with None Transformers asks at the terminal
    taken = {name: value for name, value in given.items() if name in _TAKEN and name != "config" and value is not None}
    values = {name: value for name, value in given.items() if name not in (*PLACES, *_TAKEN, *_REFUSED)}
    require_checkpoint(path_or_id, subfolder=places.get("subfolder"), gguf_file=taken.get("gguf_file"))
    if config is None or isinstance(config, (str, Path)):
        if config is not None:
            if _is_local(config) and not Path(config).exists():
                raise CheckpointError(f"config={str(config)!r}: there is no such folder or file", file=str(config))
            config, values = _read(config, {**places, "subfolder": ""}, values)
        elif files := gguf_files(path_or_id, {**places, **taken}):
            config, values = gguf_config(files, values)
        else:
            config, values = _read(path_or_id, places, values)
    elif not hasattr(config, "to_diff_dict"):
        raise ConfigError(
            f"config={type(config).__name__} is not a config of Transformers, a folder that holds config.json, or a "
            "JSON file; single values are keywords of their own (num_hidden_layers=2)"
        )
    for name in values:
        if hasattr(config, name):
            raise ConfigError(f"{name}= beside a config object is ambiguous; set config.{name} in its place")
        raise unknown_option(name, "load", (*PLACES, *_TAKEN, *config.to_dict()))
    _require_sound(config, path_or_id, places.get("subfolder"))
    if getattr(config, "dtype", None) is None and (files := gguf_files(path_or_id, {**places, **taken})):
        config = copy.copy(config)
        config.dtype = stored_dtype(read_headers(files))
    return config, {**places, **taken}


def _require_sound(config: Any, path_or_id: str | Path, subfolder: str | None) -> None:
    """What Transformers takes as it comes, and fails on later in its own words."""

    def refused(what: str, name: str = "config.json") -> CheckpointError:
        return CheckpointError(f"{path_or_id}: {name} {what}", file=str(Path(path_or_id) / name))

    names = getattr(config, "architectures", None) or []
    if not isinstance(names, (list, tuple)) or any(not isinstance(name, str) for name in names):
        raise refused(f"says architectures={names!r:.80}, which is no list of names of classes")
    layers = getattr(config.get_text_config(decoder=True), "num_hidden_layers", 0)
    if isinstance(layers, int) and layers > MOST_LAYERS:
        raise refused(f"says num_hidden_layers={layers}; emoe takes up to {MOST_LAYERS}")
    beside = Path(path_or_id) / (subfolder or "") / "generation_config.json"
    if beside.is_file():
        found = jsontext.read(beside, "generation config", partial(CheckpointError, file=str(beside)))
        if not isinstance(found, dict):
            raise refused(f"is {type(found).__name__}, not an object of values", beside.name)


def without_quantization(config: Any) -> tuple[Any, dict[str, Any] | None]:
    """A copy of a config as it would be were the weights plain, and what it says of their encodings, wherever in it.

    Where several of its parts speak of them and differ, the first is taken, with the others under their names.
    """
    config = copy.deepcopy(config)
    parts = {name: getattr(config, name, None) for name in getattr(config, "sub_configs", ())}
    return config, take_quantization(
        {"": config.__dict__, **{name: vars(each) for name, each in parts.items() if each}}
    )


def take_quantization(parts: Mapping[str, dict[str, Any]]) -> dict[str, Any] | None:
    """Takes what a config says of encodings out of it; gives it as `without_quantization` does.

    Args:
        parts: values of the config, under "", and of those in it, by name.
    """
    found: dict[str, Any] | None = None
    for name, values in parts.items():
        said = values.pop("quantization_config", None)
        if said is not None:
            said = dict(said) if isinstance(said, Mapping) else said.to_dict()
            found = said if found in (None, said) else {**found, name: said}
            values.pop("expert_dtype", None)  # DeepSeek-V4's
    return found


def _read(path: str | Path, places: dict[str, Any], values: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    from transformers import AutoConfig

    try:
        config, unused = AutoConfig.from_pretrained(path, return_unused_kwargs=True, **places, **values)
    except Exception as error:  # classes of configs check their values in ways of their own
        if "trust_remote_code" in str(error):
            raise remote_code_refused(str(path)) from error
        if values:
            given = ", ".join(f"{name}={value!r}" for name, value in values.items())
            raise ConfigError(f"{path} with {given}: {one_line(error)[:400]}") from error
        raise CheckpointError(f"{path}: {one_line(error)[:400]}", file=str(path)) from error
    return config, {name: unused[name] for name in values if name in unused}


def remote_code_refused(name: str) -> ConfigError:
    """What is said where a checkpoint brings Python code of its own."""
    return ConfigError(
        f"{name} brings Python code of its own, which runs only with trust_remote_code=True ("
        "--trust-remote-code of emoe run); "
        "read it first. Its experts work where they go through Transformers' experts interface"
    )


def require_checkpoint(path_or_id: str | Path, *, subfolder: str | None = None, gguf_file: str | None = None) -> None:
    """Refuses what is here and is no checkpoint folder; what is not here may be a hub id.

    Raises:
        ConfigError: a file of another kind, or a folder with several GGUF checkpoints.
        CheckpointError: there is no such folder or file, or no config.json and no GGUF in it.
    """
    path = Path(path_or_id)
    try:
        path.is_dir()
    except OSError as error:
        raise ConfigError(f"{str(path)!r:.80} is no path: {error.strerror}") from error
    if path.is_dir():
        if subfolder or gguf_file or (path / "config.json").is_file() or gguf_files(path, {}):
            return
        raise CheckpointError(
            f"{str(path)!r} has no config.json and no .gguf; give a checkpoint folder of Transformers, or a GGUF file",
            file=str(path),
        )
    if gguf_file is None and (path.suffix == ".gguf" or path.is_file()) and gguf_files(path, {}):
        return
    if path.exists():
        raise ConfigError(f"{str(path)!r} is a file; give the folder that holds it and config.json")
    if _is_local(path_or_id):
        raise CheckpointError(f"there is no folder {str(path_or_id)!r}", file=str(path_or_id))


def _is_local(path_or_id: str | Path) -> bool:
    """Whether it cannot be a hub id."""
    path = Path(path_or_id)
    return isinstance(path_or_id, Path) or path.is_absolute() or path_or_id[:1] in (".", "~") or len(path.parts) > 2
