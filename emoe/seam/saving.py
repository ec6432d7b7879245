"""Keeps a model whole for whoever saves it while its experts lie in a store.

`state_dict()` of the model, or of any part of it, gets the experts through torch's own hooks. `save_pretrained` would
hold all of them at once that way; the one here writes them layer by layer and puts the files in place at the very end.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from emoe.errors import CheckpointError, ClosedError, SaveError
from emoe.files import OwnFolder
from emoe.memory import available_memory, format_bytes
from emoe.seam import elsewhere
from emoe.seam.linear import add_state_dict_hooks
from emoe.store import ExpertStore, read_layer
from emoe.store.headers import INDEX_NAME, SINGLE_NAME

_REFUSED = {
    "variant": "rename the files afterwards",
    "push_to_hub": "save into a folder, then upload it",
    "distributed_checkpoint": "emoe runs on one device",
}


class SavingGuard:
    """See `emoe.seam.load.guard_saving`."""

    def __init__(self, model: Any, store: ExpertStore) -> None:
        self._model, self._store = model, store
        self._with_experts = True
        self._original = model.save_pretrained
        self._hooks = [
            model.get_submodule(layer.path).register_state_dict_post_hook(partial(self._add_experts, number))
            for number, layer in enumerate(store.layers)
        ]
        self._hooks += add_state_dict_hooks(model)
        model.save_pretrained = self._save_pretrained

    def remove(self) -> None:
        """Takes the hooks away; calling it again does nothing."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        self._model.__dict__.pop("save_pretrained", None)

    def _add_experts(
        self, number: int, module: nn.Module, state: dict[str, Any], prefix: str, metadata: dict[str, Any]
    ) -> None:
        if not self._with_experts:
            return
        needed, free = self._layer_bytes(number), available_memory()
        if needed > free:
            raise SaveError(
                f"state_dict() needs {format_bytes(needed)} for the experts of {self._store.layers[number].path}; "
                f"{format_bytes(free)} are free. save_pretrained writes the model layer by layer"
            )
        for name, value in self._read(number).items():
            state[f"{prefix}{name}"] = value

    def _without_experts(self) -> dict[str, Any]:
        self._with_experts = False
        try:
            return self._model.state_dict()
        finally:
            self._with_experts = True

    def _layer_bytes(self, number: int) -> int:
        module = self._model.get_submodule(self._store.layers[number].path)
        return sum(each.numel() * each.dtype.itemsize for each in elsewhere.placeholders(module).values())

    def _read(self, number: int) -> dict[str, Any]:
        try:
            values = read_layer(self._store, number)
            return elsewhere.as_placed(self._model.get_submodule(self._store.layers[number].path), values)
        except (CheckpointError, ClosedError) as error:
            raise SaveError(f"the experts of {self._store.layers[number].path} cannot be read: {error}") from error

    def _save_pretrained(self, save_directory: str | Path, *args: Any, **kwargs: Any) -> None:
        """As Transformers' `save_pretrained`, with shards of at most one layer's experts.

        Raises:
            SaveError: the folder is the one the experts are read from, an option cannot be kept, or the writing failed.
                Nothing half-written is left; what an earlier save left there stays unless moving the new files failed.
        """
        if args:  # is_main_process, state_dict, ... in Transformers' order
            names = ("is_main_process", "state_dict", "push_to_hub", "max_shard_size", "variant", "token")
            kwargs.update(zip(names, args, strict=False))
        for name, instead in _REFUSED.items():
            if kwargs.get(name):
                raise SaveError(f"save_pretrained({name}={kwargs[name]!r}) is not kept under emoe: {instead}")
        if not kwargs.get("is_main_process", True):
            return
        if kwargs.get("state_dict") is not None:
            self._save_given(save_directory, kwargs)
            return
        if getattr(self._model, "_hf_peft_config_loaded", False):  # Transformers then writes the adapters alone
            self._save_as_ever(save_directory, {**kwargs, "state_dict": self._without_experts()})
            return
        folder = Path(save_directory)
        self._refuse_own_folder(folder)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            staging = OwnFolder(folder, "saving")
        except OSError as error:
            raise SaveError(f"{folder} cannot be written: {error.strerror or error}") from error
        try:
            with _failing_as(folder):
                self._write(staging.path, kwargs)
                _put_in_place(staging.path, folder)
        finally:
            staging.remove()

    def _save_as_ever(self, folder: str | Path, kwargs: dict[str, Any]) -> None:
        with _failing_as(folder):
            self._original(folder, **kwargs)

    def _save_given(self, save_directory: str | Path, kwargs: dict[str, Any]) -> None:
        wanted = {f"{layer.path}.{param.name}" for layer in self._store.layers for param in layer.params}
        lacking = sorted(wanted - set(kwargs["state_dict"]))
        if lacking:
            raise SaveError(f"the state_dict to be saved lacks experts, among them {lacking[0]}; leave it out")
        self._save_as_ever(save_directory, kwargs)

    def _refuse_own_folder(self, folder: Path) -> None:
        for file in self._store.files():
            if folder.resolve() in (Path(file).absolute().parent.resolve(), Path(file).resolve().parent):
                raise SaveError(f"{folder} holds the experts this model runs on ({file}); save into another folder")

    def _write(self, staging: Path, kwargs: dict[str, Any]) -> None:
        """Writes everything into an empty folder: shards in the scheme of Transformers, and their index."""
        from safetensors.torch import save_file

        self._original(staging, **{**kwargs, "state_dict": self._without_experts()})
        weight_map, total = _collect(staging)
        shards = sorted(set(weight_map.values()))
        for number in range(len(self._store.layers)):
            for tensors in self._shards_of_layer(number, kwargs):
                shard = f"experts-{len(shards):05}.safetensors"
                save_file(tensors, staging / shard, metadata={"format": "pt"})
                shards.append(shard)
                weight_map.update(dict.fromkeys(tensors, shard))
                total += sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        final = {
            shard: f"model-{position:05}-of-{len(shards):05}.safetensors"
            for position, shard in enumerate(shards, start=1)
        }
        for shard in shards:
            (staging / shard).rename(staging / f"renamed-{final[shard]}")
        for name in final.values():
            (staging / f"renamed-{name}").rename(staging / name)
        index = {
            "metadata": {"total_size": total},
            "weight_map": {tensor: final[shard] for tensor, shard in sorted(weight_map.items())},
        }
        (staging / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")

    def _shards_of_layer(self, number: int, kwargs: dict[str, Any]) -> list[dict[str, Any]]:
        from huggingface_hub import split_torch_state_dict_into_shards
        from transformers.core_model_loading import revert_weight_conversion

        layer = self._store.layers[number]
        module = self._model.get_submodule(layer.path)
        parameters = {name: elsewhere.Stored(value, requires_grad=False) for name, value in self._read(number).items()}
        state: dict[str, Any] = {f"{layer.path}.{name}": value.detach() for name, value in parameters.items()}
        if kwargs.get("save_original_format", True):
            placed = elsewhere.placeholders(module)
            module._parameters.update(parameters)  # some conversions ask the model for shapes
            try:
                state = revert_weight_conversion(self._model, state)
            finally:
                module._parameters.update(placed)
        split = split_torch_state_dict_into_shards(state, max_shard_size=kwargs.get("max_shard_size", "50GB"))
        return [{name: state[name].contiguous() for name in names} for names in split.filename_to_tensors.values()]


@contextmanager
def _failing_as(folder: str | Path) -> Iterator[None]:
    """In the block, what cannot be written is a SaveError, whoever was to write it."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, SafetensorError) as error:
        raise SaveError(f"saving into {folder} failed: {getattr(error, 'strerror', None) or error}") from error


def _collect(folder: Path) -> tuple[dict[str, str], int]:
    """Tensors that Transformers wrote, with their files; its own index, if any, goes."""
    from emoe.store.headers import read_header

    (folder / INDEX_NAME).unlink(missing_ok=True)
    weight_map: dict[str, str] = {}
    total = 0
    for file in sorted(folder.glob("*.safetensors")):
        for name, entry in read_header(file).items():
            weight_map[name] = file.name
            total += entry.nbytes
    return weight_map, total


def _put_in_place(staging: Path, folder: Path) -> None:
    """Weights of an earlier save go first and the index comes last: a folder cut off between them loads nowhere."""
    for old in (folder / INDEX_NAME, folder / SINGLE_NAME, *folder.glob("model-?????-of-?????.safetensors")):
        old.unlink(missing_ok=True)
    files = sorted(staging.iterdir(), key=lambda file: file.name == INDEX_NAME)
    for file in files:
        file.replace(folder / file.name)
