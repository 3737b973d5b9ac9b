"""From a command line to a typed, frozen config, and its `--help`. The only place that knows OmegaConf.

A command is `scldm VERB [PRESET ...] [key=value ...]`: the dataclass gives the schema and the defaults, each preset
(`vae/tiny`, or a path to a YAML file) is merged over it from left to right, then each `key=value`. `--some-key value`
is another spelling of `some_key=value`, and `--some-flag` of `some_flag=true`. Anything else is an error with its key.

Reading order: presets, parse, help.
"""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import re
import typing
from collections.abc import Iterator, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from scldm.checked import check_ranges
from scldm.errors import InputError

Config = TypeVar("Config")


# --- presets -------------------------------------------------------------------------------------------------------


def shipped(folder: str) -> Path:
    """A folder that travels with the launch package: `configs` or `slurm`; in a checkout it lies beside the package."""
    inside = Path(str(resources.files("launch"))) / folder
    return inside if inside.is_dir() else inside.parent.parent / folder


def preset_path(name: str) -> Path:
    """The file of a preset: a path to a YAML file, or `group/name` of the shipped ones.

    Raises: InputError with the presets of that group.
    """
    if name.endswith((".yaml", ".yml")):
        if not Path(name).is_file():
            raise InputError(f"preset {name!r}: no such file")
        return Path(name)
    root = shipped("configs")
    path = root / f"{name}.yaml"
    if not path.is_file():
        known = sorted(str(p.relative_to(root).with_suffix("")) for p in root.glob("*/*.yaml"))
        near = [k for k in known if k.split("/")[0] == name.split("/")[0]] or known
        raise InputError(f"preset {name!r} is unknown; there are: {', '.join([*near, 'a path to a .yaml file'])}")
    return path


def load_preset(name: str) -> DictConfig:
    """A preset as it stands in its file. Raises: InputError where that is not a YAML mapping."""
    path = preset_path(name)
    try:
        preset = OmegaConf.load(path)
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:  # OmegaConf reads by way of yaml
        raise InputError(f"preset {name!r}: {path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(preset, DictConfig):
        raise InputError(f"preset {name!r}: {path} must hold `key: value` lines")
    return preset


# --- parse ---------------------------------------------------------------------------------------------------------


def compose(schema: type[Config], argv: Sequence[str]) -> Config:
    """The config of a command line: schema <- each preset in order <- each key=value, as a frozen dataclass.

    Raises: InputError with the dotted key for anything unknown, of the wrong type, out of range, or missing.
    """
    words = [word for word, _ in with_options_read(schema, argv)]
    config = OmegaConf.structured(schema)
    while nested := [key for key in OmegaConf.missing_keys(config) if dataclasses.is_dataclass(_kind(schema, key))]:
        for key in nested:  # a nested config without a default: its own required keys are what is missing
            config = _merge(config, _at(key, OmegaConf.structured(_kind(schema, key))), key)
    for name in [word for word in words if "=" not in word]:
        config = _merge(config, load_preset(name), f"preset {name}")
    for override in [word for word in words if "=" in word]:
        config = _merge(config, _nested(schema, override), override)
    missing = sorted(OmegaConf.missing_keys(config))
    if missing:
        raise InputError(f"{missing[0]} must be given, as {missing[0]}=VALUE")
    check_ranges(config, schema)  # before the parts are made, which know no more than their own keys
    return typing.cast(Config, OmegaConf.to_object(config))


def with_options_read(schema: type, argv: Sequence[str], only_known: bool = False) -> Iterator[tuple[str, bool]]:
    """Every word of a command line, an option (`--some-key value`) as `some_key=value`; and whether it was one.

    only_known: leave options that the schema has no key for as they are, for another schema
    """
    words = list(argv)
    while words:
        word = words.pop(0)
        key, equals, value = word.removeprefix("--").partition("=")
        kind = _kind(schema, key := key.replace("-", "_"))
        if not word.startswith("--") or (only_known and kind is None):
            yield word, False
            continue
        if kind is bool and not equals:
            value = words.pop(0) if words[:1] in (["true"], ["false"]) else "true"
        elif not equals:
            if not words or words[0].startswith("--"):
                raise InputError(f"{word} needs a value")
            value = words.pop(0)
        yield f"{key}={value}", True


def _kind(schema: type, dotted_key: str) -> Any:
    """The type of a key; None for one that the schema does not spell out."""
    kind: Any = schema
    for name in dotted_key.split("."):
        if dataclasses.is_dataclass(kind):
            kind = typing.get_type_hints(kind).get(name)
        else:  # of a mapping, any key
            kind = typing.get_args(kind)[1] if typing.get_origin(kind) is dict else None
    return kind


def _is_text(kind: Any) -> bool:
    """Whether a type is text, or lists or mappings of text alone."""
    inner = [of for of in typing.get_args(kind) if of is not Ellipsis]
    is_group = typing.get_origin(kind) in (tuple, list, dict)
    return kind in (str, Path, str | None, Path | None) or (is_group and all(map(_is_text, inner)))


def _nested(schema: type, override: str) -> dict[str, Any]:
    """`a.b=value` as {"a": {"b": value}}. Text stays as typed (`1.10`, `yes`, `a: b`), in lists and mappings too, whose
    brackets, braces and quotes are YAML's; other types are read as YAML."""
    key, _, text = override.partition("=")
    kind = _kind(schema, key)
    is_list = typing.get_origin(kind) in (tuple, list) and not text.startswith("[")
    value: Any
    if _is_text(kind) and typing.get_origin(kind) in (tuple, list, dict):
        if is_list:
            value = [part.strip() for part in text.split(",")] if text else []
        else:
            value = _yaml_text(text, override)
    elif _is_text(kind) and (kind in (str, Path) or text != "null"):
        value = text
    else:
        value = _yaml(f"[{text}]" if is_list else text, override)
    return _at(key, value)


def _at(dotted_key: str, value: Any) -> dict[str, Any]:
    for name in reversed(dotted_key.split(".")):
        value = {name: value}
    return value


def _yaml(text: str, override: str) -> Any:
    try:
        return OmegaConf.from_dotlist([f"value={text}"])["value"]
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise InputError(f"{override}: {text!r} can't be read: {' '.join(str(error).split())}") from None


def _yaml_text(text: str, override: str) -> Any:
    """YAML in which every value is text as it stands there."""
    try:
        return yaml.load(text, Loader=yaml.BaseLoader)
    except yaml.YAMLError as error:
        raise InputError(f"{override}: {text!r} can't be read: {' '.join(str(error).split())}") from None


def _merge(config: DictConfig, other: Any, where: str) -> DictConfig:
    try:
        return typing.cast(DictConfig, OmegaConf.merge(config, other))
    except (OmegaConfBaseException, TypeError) as error:
        key = getattr(error, "full_key", "") or where.partition("=")[0]
        if type(error).__name__ == "ConfigKeyError":
            raise InputError(f"{where}: unknown key {key!r}{_nearest(config, key)}") from None
        at = "" if where.startswith(f"{key}=") else f"{key}: "
        raise InputError(f"{where}: {at}{str(error).splitlines()[0]}") from None


def _nearest(config: DictConfig, key: str) -> str:
    known = [k for k, *_ in flatten(OmegaConf.get_type(config) or dict)]
    near = difflib.get_close_matches(key, known, n=3, cutoff=0.5)
    near = near or [k for k in known if k.split(".")[-1] == key.split(".")[-1]]
    return f"; did you mean {', '.join(near)}?" if near else "; --help lists the keys"


def to_yaml(config: object) -> str:
    """The resolved config as YAML, as kept in a run folder; `compose` reads it as a preset."""
    values = OmegaConf.to_container(OmegaConf.structured(config))
    return OmegaConf.to_yaml(OmegaConf.create(_plain(values)))


def _plain(values: Any) -> Any:
    """With every Path as its text."""
    if isinstance(values, dict):
        return {key: _plain(value) for key, value in values.items()}
    return str(values) if isinstance(values, Path) else values


# --- help ----------------------------------------------------------------------------------------------------------


def flatten(schema: type, prefix: str = "") -> list[tuple[str, str, str, str]]:
    """Every dotted key of a schema with its type, its default and the line of its class's docstring about it."""
    hints = typing.get_type_hints(schema)
    texts = {}
    for kind in reversed(schema.__mro__):  # a config may add keys to another
        texts |= dict(re.findall(r"^ *(\w+): (.+(?:\n {4,}\S.*)*)", inspect.cleandoc(kind.__doc__ or ""), re.MULTILINE))
    rows = []
    for field in dataclasses.fields(schema):
        kind = hints[field.name]
        if dataclasses.is_dataclass(kind):
            rows += flatten(typing.cast(type, kind), f"{prefix}{field.name}.")
            continue
        if field.default_factory is not dataclasses.MISSING:
            default = repr(field.default_factory())
        else:
            default = "required" if field.default in (dataclasses.MISSING, "???") else str(field.default) or "empty"
        text = " ".join(texts.get(field.name, "").split())
        rows.append((prefix + field.name, _type_name(kind), default, text))
    return rows


def _type_name(kind: Any) -> str:
    if typing.get_origin(kind) is typing.Literal:
        return "|".join(map(str, typing.get_args(kind)))
    return str(kind).replace("typing.", "") if typing.get_origin(kind) else getattr(kind, "__name__", str(kind))


def help_text(command: str, purpose: str, schema: type, example: str, usage: str = "") -> str:
    """What `COMMAND --help` prints: purpose, example, presets, every key with type, default and meaning."""
    root = shipped("configs")
    presets = "  ".join(sorted(str(p.relative_to(root).with_suffix("")) for p in root.glob("*/*.yaml")))
    lines = [
        f"usage: {usage or f'{command} [PRESET ...] [key=value ...]'}",
        "",
        purpose.strip(),
        "",
        "example:",
        *(f"  {line}" for line in example.strip().splitlines()),
        "",
        f"presets, merged from left to right (or a path to a .yaml file): {presets}",
        "",
        "keys (--some-key VALUE is another spelling of some_key=VALUE):",
    ]
    for key, kind, default, text in flatten(schema):
        lines.append(f"  {key}  [{kind}; {default}]")
        if text:
            lines.append(f"      {text}")
    return "\n".join(lines)
