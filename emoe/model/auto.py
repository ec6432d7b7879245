"""Which class of Transformers a checkpoint is a model of: what its config names, or what the caller asks for."""

from __future__ import annotations

from typing import Any

from emoe.errors import ConfigError, UnsupportedModelError

# Tried in this order where the config names no class of its own.
_AUTO = (
    "AutoModelForCausalLM",
    "AutoModelForImageTextToText",
    "AutoModelForMultimodalLM",
    "AutoModelForSeq2SeqLM",
    "AutoModelForSequenceClassification",
    "AutoModel",
)


def model_class(config: Any, auto_class: Any = None) -> Any:
    """The class to load a checkpoint with; it has `from_pretrained`.

    Args:
        config: the checkpoint's.
        auto_class: a class of Transformers, an Auto class or its name; None: the one in the config's `architectures`.

    Raises:
        ConfigError: `auto_class` is no such class, or does not take this config.
        UnsupportedModelError: the config belongs to no kind of model that emoe knows.
    """
    if auto_class is not None:
        return _asked_for(config, auto_class)
    remote = getattr(config, "auto_map", None) or {}
    for name in _AUTO:
        if name in remote:
            return _named(name)
    own = _named(next(iter(getattr(config, "architectures", None) or ()), ""))
    takers = [taker for taker in map(_named, _AUTO) if type(config) in taker._model_mapping]
    if own is not None and hasattr(own, "_from_config") and getattr(own, "config_class", None) is type(config):
        causal = _named(_AUTO[0])
        return causal if causal in takers and own in _classes(causal, config) else own
    if takers:
        return takers[0]
    raise UnsupportedModelError(
        f"{type(config).__name__} belongs to none of: {', '.join(_AUTO)}. auto_class= names the class to load it with"
    )


def from_config(cls: Any, config: Any, *, dtype: Any, trust_remote_code: bool, **kwargs: Any) -> Any:
    """A model with fresh weights, of a class that `model_class` gave; `kwargs` as Transformers' `from_config`."""
    if hasattr(cls, "from_config"):
        return cls.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code, **kwargs)
    return cls._from_config(part_of(config, cls), dtype=dtype, **kwargs)


def _named(name: str) -> Any:
    import transformers

    return getattr(transformers, name, None) if name else None


def _classes(auto: Any, config: Any) -> tuple[Any, ...]:
    found = auto._model_mapping[type(config)]
    return tuple(found) if isinstance(found, (list, tuple)) else (found,)


def _asked_for(config: Any, auto_class: Any) -> Any:
    cls = _named(auto_class) if isinstance(auto_class, str) else auto_class
    if not isinstance(cls, type) or not (hasattr(cls, "_model_mapping") or hasattr(cls, "_from_config")):
        raise ConfigError(
            f"auto_class={auto_class!r} is no model class of Transformers, such as {', '.join(_AUTO)} or the class "
            "in a config's architectures"
        )
    remote = getattr(config, "auto_map", None) or {}
    if hasattr(cls, "_model_mapping"):
        if type(config) not in cls._model_mapping and cls.__name__ not in remote:
            raise ConfigError(f"auto_class={auto_class!r} takes no {type(config).__name__}")
    else:
        part_of(config, cls)
    return cls


def part_of(config: Any, cls: Any) -> Any:
    """The config, or the part of it that a class for one part of a composite model takes."""
    wanted = getattr(cls, "config_class", None)
    if wanted is None or isinstance(config, wanted):
        return config
    for name in getattr(config, "sub_configs", ()):
        if isinstance(part := getattr(config, name, None), wanted):
            return part
    raise ConfigError(f"auto_class={cls.__name__} takes a {wanted.__name__}, not a {type(config).__name__}")
