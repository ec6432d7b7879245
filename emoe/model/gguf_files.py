"""Whether what a caller names is a GGUF checkpoint, which files it is made of, and the config that they hold."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from emoe.errors import CheckpointError, ConfigError, one_line
from emoe.files.gguf import MAGIC, GgufHeader, checkpoints, open_header, parts, require_parts

_WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "*.bin")


def gguf_files(path_or_id: str | Path, given: Mapping[str, Any]) -> list[Path]:
    """The files of a GGUF checkpoint, all parts in order; none where it is another kind of checkpoint.

    Args:
        path_or_id: a .gguf file; a folder or hub id, with `gguf_file` among `given`; a folder with one GGUF checkpoint
            and no other weights.
        given: `gguf_file`, and places of files as Transformers takes them (revision, subfolder, ...).

    Raises:
        CheckpointError: a file, or a part of several, is missing.
        ConfigError: a folder holds several and nothing says which.
    """
    name = given.get("gguf_file")
    path = Path(path_or_id).expanduser()
    if name is None and not path.is_dir() and (path.suffix == ".gguf" or _begins_as_one(path)):
        return _all_there(parts(path))
    if not path.is_dir():
        return [] if name is None else _from_hub(str(path_or_id), str(name), given)
    path /= given.get("subfolder") or ""
    if name is not None:
        return _all_there(parts(path / name))
    found = checkpoints(each.name for each in path.glob("*.gguf"))
    if not found or any(next(path.glob(pattern), None) for pattern in _WEIGHTS):
        return []
    if len(found) > 1:
        raise ConfigError(f"{path} holds {len(found)} GGUF checkpoints: {', '.join(found)}; gguf_file= says which")
    return _all_there(parts(path / found[0]))


def _begins_as_one(path: Path) -> bool:
    """Whether a file of another name, such as a blob of Ollama's, is GGUF."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(len(MAGIC)) == MAGIC


def _all_there(files: list[Path]) -> list[Path]:
    for file in files:
        if not file.is_file():
            what = f"; it is one of {len(files)} parts of a checkpoint" if len(files) > 1 else ""
            raise CheckpointError(f"there is no file {str(file)!r}{what}", file=str(file))
    return files


def _from_hub(name: str, file: str, given: Mapping[str, Any]) -> list[Path]:
    from transformers.utils import cached_file

    known = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")
    places = {key: given[key] for key in known if given.get(key) is not None}
    try:
        return [Path(str(cached_file(name, str(part), **places))) for part in parts(Path(file))]
    except OSError as error:
        raise CheckpointError(f"{name}: {one_line(error)[:400]}", file=file) from error


def read_headers(files: list[Path]) -> list[GgufHeader]:
    """Of all parts.

    Raises:
        CheckpointError: a file is missing, truncated or damaged, or they do not belong together.
    """
    headers = [open_header(file) for file in files]
    require_parts(headers)
    return headers


def gguf_config(files: list[Path], values: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The config that a checkpoint holds, with `values` in place of its own, and those of them that it does not know.

    Raises:
        CheckpointError: the files are damaged, or say too little.
        UnsupportedModelError: emoe does not know the architecture, or something that the file asks for.
        ConfigError: `values` do not go with the rest.
    """
    from transformers import AutoConfig

    from emoe.model.gguf_config import Metadata, config_values
    from emoe.model.gguf_tensors import architecture

    headers = read_headers(files)
    of = Metadata(headers)
    fields = config_values(of, architecture(of.architecture, str(files[0])).values)
    fields["dtype"] = stored_dtype(headers)
    cls = type(AutoConfig.for_model(fields["model_type"]))
    known = {*cls.__dataclass_fields__, *cls.attribute_map}
    given = {name: value for name, value in values.items() if name in known}
    try:
        config = cls(**{**{key: value for key, value in fields.items() if key != "model_type"}, **given})
    except Exception as error:  # classes of configs check their values in ways of their own
        if given:
            what = ", ".join(f"{name}={value!r}" for name, value in given.items())
            raise ConfigError(f"{files[0]} with {what}: {one_line(error)[:400]}") from error
        raise CheckpointError(f"{files[0]}: {one_line(error)[:400]}", file=str(files[0])) from error
    config.name_or_path = str(files[0])
    return config, {name: value for name, value in values.items() if name not in known}


def stored_dtype(headers: list[GgufHeader]) -> str:
    """The dtype to run in: that of the plain tensors, float32 left aside; bfloat16 where others are in blocks."""
    kinds = {each.kind for header in headers for each in header.tensors.values()} - {"F32"}
    return {frozenset(): "float32", frozenset({"F16"}): "float16"}.get(frozenset(kinds), "bfloat16")
