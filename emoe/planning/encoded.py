"""How the weights of a checkpoint lie on the disk, before anything is loaded: from the headers of its files, else from
its config alone (formats.py)."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from emoe.errors import CheckpointError, UnsupportedModelError
from emoe.model.config import without_quantization
from emoe.model.encoding import encoding
from emoe.model.gguf_files import gguf_files
from emoe.model.spec import ExpertForm
from emoe.model.structure import experts_modules, num_experts, param_specs
from emoe.planning.formats import Formats, formats_said
from emoe.store.checkpoint import Forms, Sizes, encoded_forms, forms_of_one, model_keys
from emoe.store.companions import EncodedWeight
from emoe.store.declared import QUANTIZER_FILES, said_of_encodings
from emoe.store.gguf import GgufCheckpoint
from emoe.store.headers import INDEX_NAME, SINGLE_NAME, TensorEntry, checkpoint_files, read_headers, remote_headers

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Stored:
    """Attributes:
    forms: what an expert of each layer is, None where nothing is encoded; and bytes.
    source: what tells it: "headers" of files, or the "config" alone.
    note: what is assumed, as a sentence, else "".
    """

    forms: Forms
    source: str
    note: str = ""


def stored(path_or_id: str | Path, model: Any, config: Any, places: Mapping[str, Any]) -> Stored:
    """How the weights of a checkpoint lie.

    Args:
        path_or_id: of the checkpoint.
        model: on the meta device.
        config: of the checkpoint, with what it says of encodings.
        places: where Transformers looks for files (`subfolder`, `revision`, `token`), and `gguf_file`.

    Raises:
        CheckpointError, UnsupportedModelError: as `emoe.store.checkpoint.read_checkpoint`; without files, the config
            leaves open how weights lie.
    """
    if files := gguf_files(path_or_id, places):
        with closing(GgufCheckpoint(files)) as checkpoint:
            return Stored(checkpoint.forms(model), "headers")
    _, quantization = without_quantization(config)
    folder = Path(path_or_id) / (places.get("subfolder") or "")
    if folder.is_dir():
        here = any((folder / name).is_file() for name in (SINGLE_NAME, INDEX_NAME))
        entries = read_headers(checkpoint_files(folder)) if here else None
        said = said_of_encodings(quantization, folder)
    else:
        in_cache = _cached(path_or_id, places, local_files_only=True)
        said = said_of_encodings(quantization, in_cache or _cached(path_or_id, places))
        entries = _of_the_hub(str(path_or_id), in_cache, places, ask=said is not None)
    if entries is not None:
        return Stored(encoded_forms(entries, model, quantization, str(folder)), "headers")
    return _expected(model, config, said)


def _cached(name: str | Path, places: Mapping[str, Any], **own: Any) -> Path | None:
    """Folder of a hub id's files in its cache; what quantizers put beside the config is fetched into it."""
    from transformers.utils import cached_file

    quiet = {f"_raise_exceptions_for_{what}": False for what in ("gated_repo", "missing_entries", "connection_errors")}
    where = {key: value for key, value in places.items() if key not in ("code_revision", "trust_remote_code")}
    found = [cached_file(str(name), each, **{**where, **quiet, **own}) for each in ("config.json", *QUANTIZER_FILES)]
    return None if found[0] is None else Path(found[0]).parent


def _of_the_hub(
    name: str, folder: Path | None, places: Mapping[str, Any], *, ask: bool
) -> dict[str, TensorEntry] | None:
    """Headers of the files in its cache, else, if asked, those on the hub; None where it cannot be asked."""
    try:
        return read_headers(checkpoint_files(folder or Path()))
    except CheckpointError as error:
        logger.debug("%s is planned without its files: %s", name, error)
    if not ask or places.get("local_files_only") or places.get("subfolder"):
        return None
    return remote_headers(name, revision=places.get("revision"), token=places.get("token"))


def _expected(model: Any, config: Any, said: tuple[Mapping[str, Any], str] | None) -> Stored:
    """What files would hold, by the names and shapes that Transformers gives to the tensors it writes."""
    formats = Formats("config.json", "") if said is None else formats_said(*said)
    checkpoint = _Checkpoint(model, formats, _stored_dtype(model, config))
    forms = checkpoint.add_model()
    notes = [] if said is None else [f"there are no weights here: encodings are what {said[1]} says ({formats.method})"]
    try:
        not_loaded = checkpoint.predicting_layers(forms)
    except (ImportError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        logger.debug("layers of multi-token prediction are not counted: %r", error)
        notes.append("layers of multi-token prediction, which are not loaded, are not counted")
        not_loaded = 0
    sizes = Sizes(checkpoint.nbytes + not_loaded, not_loaded, checkpoint.encoded, checkpoint.decoded)
    experts = forms if any(form.matrices for form in forms) else None
    return Stored(Forms(experts, sizes, checkpoint.whole()), "config", "; ".join(notes))


def _stored_dtype(model: Any, config: Any) -> torch.dtype:
    """Of what is not encoded: the config's, else the one that the model is to run in."""
    dtype = getattr(config, "dtype", None) or model.dtype
    return cast(torch.dtype, getattr(torch, dtype) if isinstance(dtype, str) else dtype)


class _Checkpoint:
    """The tensors of a checkpoint, as far as they are added.

    Attributes:
        nbytes: of all.
        encoded: bytes of the encoded weights outside experts.
        decoded: bytes of these in the model's dtype.
    """

    def __init__(self, model: Any, formats: Formats, dtype: torch.dtype) -> None:
        self._model, self._formats, self._dtype = model, formats, dtype
        self.nbytes = self.encoded = self.decoded = 0
        self._linear: dict[str, str] = {}

    def add_model(self) -> list[ExpertForm]:
        """Adds what a model holds; gives what its experts are."""
        model, found = self._model, experts_modules(self._model)
        one = {
            f"{path}.{param.name}": module.get_parameter(param.name)[:1]
            for path, module in found
            for param in param_specs(module)
        }
        inside = tuple(f"{path}." for path, _ in found)
        linear = _linear_layers(model, found, head=self._formats.head)
        rest = {name: each for name, each in _kept(model) if not name.startswith(inside) and name not in linear}
        for name, each in _as_saved(model, linear).items():
            self._add_linear(name, each)
        self.nbytes += sum(self._plain_bytes(each) for each in _as_saved(model, rest).values())
        return self._add_experts(found, _as_saved(model, one))

    def whole(self) -> dict[str, str]:
        """As `Forms.whole`."""
        keys = model_keys(self._linear, self._model)
        return {key: self._linear[name] for name, key, pattern, _ in keys if pattern is None}

    def predicting_layers(self, forms: list[ExpertForm]) -> int:
        """Bytes of the layers that predict more tokens than one, which a checkpoint has and a model does not."""
        from transformers.modeling_layers import MtpModel

        model, text = self._model, self._model.config.get_text_config(decoder=True)
        first = f"model.layers.{text.num_hidden_layers}."
        ignored = [str(each) for each in type(model)._keys_to_ignore_on_load_unexpected or ()]
        appended = any(re.search(pattern, f"{first}mlp") for pattern in ignored)
        if not appended and not any("mtp" in pattern for pattern in ignored):
            return 0
        names = ("num_mtp_layers", "num_nextn_predict_layers", "mtp_num_hidden_layers")
        count = next((each for each in (getattr(text, name, None) for name in names) if each is not None), None)
        if count is None:
            raise LookupError(" or ".join(names))
        try:
            with torch.device("meta"):
                layers = list(MtpModel(model, count).layers)
            projection = 0
        except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
            logger.debug("%s: such a layer is taken to be as the last of the model: %r", type(model).__name__, error)
            layers = [model.get_decoder().layers[-1]] * count
            projection = 2 * text.hidden_size**2 * self._dtype.itemsize  # of embedding and hidden state
        nbytes = len(layers) * projection
        for number, layer in enumerate(layers):
            prefix = f"model.layers.{text.num_hidden_layers + number}" if appended else f"mtp.{number}"
            found = experts_modules(layer)
            inside = tuple(f"{path}." for path, _ in found)
            for _, module in found:
                plain = self._formats.encoding(f"{prefix}.mlp.experts.0.gate_proj", expert=True) is None
                params = sum(math.prod(param.shape) for param in param_specs(module))
                nbytes += num_experts(module) * (params * self._dtype.itemsize if plain else forms[-1].nbytes)
            linear = _linear_layers(layer, found)
            for name, each in _kept(layer):
                how = None
                if name in linear and not name.startswith("eh_proj."):
                    how = self._formats.encoding(f"{prefix}.{name.removesuffix('.weight').removeprefix('mtp_block.')}")
                if not name.startswith(inside):
                    plain_bytes = each.numel() * self._dtype.itemsize
                    nbytes += plain_bytes if how is None else _bytes_of(self._encoded(name, how, tuple(each.shape)))
            if appended:  # with what it shares with the model
                shared = (model.get_input_embeddings(), model.get_output_embeddings())
                nbytes += sum(each.weight.numel() * self._dtype.itemsize for each in shared if each is not None)
        return nbytes

    def _add_experts(self, found: Sequence[Any], one: Mapping[str, torch.Tensor]) -> list[ExpertForm]:
        """`one` has the tensors of expert 0, of all experts where they are not apart."""
        modules = {f"{path}.{param.name}": (module, param) for path, module in found for param in param_specs(module)}
        weights: dict[str, Any] = {}
        for name, key, pattern, _ in model_keys(one, self._model):
            module, param = modules[key]
            shape = tuple(one[name].shape)
            if pattern is None:
                shape = (num_experts(module), *shape[1:])
            how = self._formats.encoding(name.removesuffix(".weight"), expert=True) if len(param.shape) == 2 else None
            if how is None:
                weights[name] = self._entry(name, str(self._dtype).removeprefix("torch."), shape)
            else:
                by_rows = encoding(how).codes not in ("e4m3", "e5m2", "int8")
                if pattern is None and by_rows and module.is_transposed:
                    shape = (*shape[:-2], shape[-1], shape[-2])
                weights[name] = self._encoded(name, how, shape, by_rows)
            nbytes = _bytes_of(weights[name]) + (0 if how is None else _beside(how, shape))
            self.nbytes += nbytes * (1 if pattern is None else num_experts(module))
        return forms_of_one(weights, self._model)

    def _add_linear(self, name: str, weight: torch.Tensor) -> None:
        how = self._formats.encoding(name.removesuffix(".weight"))
        if how is None or not all(each.holds(*weight.shape[-2:]) for each in encoding(how).planes):
            self.nbytes += self._plain_bytes(weight)  # quantizers leave alone what is no whole number of blocks
            return
        nbytes = _bytes_of(self._encoded(name, how, tuple(weight.shape)))
        self.nbytes += nbytes + _beside(how, tuple(weight.shape))
        self.encoded += nbytes
        self.decoded += weight.numel() * weight.dtype.itemsize
        self._linear[name] = how

    def _plain_bytes(self, tensor: torch.Tensor) -> int:
        stored = tensor.dtype == self._model.dtype
        return tensor.numel() * (self._dtype if stored else tensor.dtype).itemsize

    def _entry(self, name: str, dtype: str, shape: tuple[int, ...]) -> TensorEntry:
        return TensorEntry(self._formats.where, name, dtype, shape, 0, encoding(dtype).nbytes(shape))

    def _encoded(self, name: str, how: str, shape: tuple[int, ...], by_rows: bool = False) -> EncodedWeight:
        """Raises UnsupportedModelError where the weight is no whole number of blocks."""
        lead = shape[:-2]
        planes = encoding(how)
        try:
            shapes = planes.shapes(shape[-2], shape[-1])
        except UnsupportedModelError as error:
            raise UnsupportedModelError(f"{self._formats.where} says that {name} is {how}: {error}") from error
        entries = {each.name: self._entry(name, each.dtype, (*lead, *shapes[each.name])) for each in planes.planes}
        return EncodedWeight(name, how, shape, entries, by_rows)


def _bytes_of(source: Any) -> int:
    planes = source.planes.values() if isinstance(source, EncodedWeight) else (source,)
    return sum(each.nbytes for each in planes)


def _beside(how: str, shape: tuple[int, ...]) -> int:
    """Bytes of what lies beside a weight and is not kept: the group of each input, or its shape."""
    codes = encoding(how).codes
    each = (
        16
        if codes in ("int4", "uint8b128")
        else 4 * shape[-1]
        if codes.startswith("gptq") and not encoding(how).ordered
        else 0
    )
    return math.prod(shape[:-2]) * each


def _as_saved(model: Any, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """By the names of a checkpoint, in its shapes."""
    from transformers.core_model_loading import revert_weight_conversion

    return cast(dict[str, torch.Tensor], revert_weight_conversion(model, dict(tensors)))


def _kept(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """What a checkpoint has of a model: parameters, tied ones once, and the buffers that are kept."""
    yield from model.named_parameters()
    names = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    yield from ((name, each) for name, each in model.state_dict().items() if name not in names)


def _linear_layers(model: Any, found: Sequence[Any], *, head: bool = False) -> dict[str, torch.Tensor]:
    """Weights of linear layers that quantizers take: all outside experts, but for routers and gates of one row.

    Args:
        found: its experts modules.
        head: the output projection, too.
    """
    parameters = dict(model.named_parameters())
    output = None if head or not hasattr(model, "get_output_embeddings") else model.get_output_embeddings()
    blocks = tuple((f"{path.rpartition('.')[0]}.", num_experts(module)) for path, module in found)
    inside = tuple(f"{path}." for path, _ in found)
    return {
        f"{path}.weight": module.weight
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not output and f"{path}.weight" in parameters
        and not path.startswith(inside) and module.out_features != 1
        and not any(path.startswith(block) and module.out_features == experts for block, experts in blocks)
    }  # fmt: skip
