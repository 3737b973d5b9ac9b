"""From a command line to a typed, frozen config, and its `--help`. The only place that knows OmegaConf.

A command is `scldm VERB [PRESET ...] [key=value ...]`. The dataclass gives the schema and the defaults. Each preset
(`vae/tiny`, or a path to a YAML file) is merged over it from left to right, then each `key=value`. `--some-key value`
is another spelling of `some_key=value`, and `--some-flag` of `some_flag=true`. `--key a --key b` of a list is
`key=a,b`. Anything else is an error with its key. Values are text as it stands: `${...}` means nothing in them. Configs
are kept in files, and hold no password.

Reading order: presets, parse, passwords, help.
"""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import io
import itertools
import json
import os
import re
import typing
from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from scldm.checked import check_ranges
from scldm.environment import check_uri, without_passwords
from scldm.errors import InputError
from scldm.files import check_path, flat

Config = TypeVar("Config")
DOLLAR = "\ue000{"  # stands for `${` while OmegaConf reads YAML: a character of nobody's text
# keys that name a file or folder: what each is, docs/commands.md says
PLACES = (
    *("path", "at", "run", "runs", "folders", "run_dir", "vae", "ldm", "model", "shards", "data.shards"),
    *("h5ad", "source.paths", "like", "generated", "real", "embedding", "out"),
)
KEEPS_PASSWORD = {"tracking.uri": "MLFLOW_TRACKING_URI"}  # key -> the variable that a URL's password is moved to


# --- presets -------------------------------------------------------------------------------------------------------


def shipped(folder: str) -> Path:
    """A folder that travels with the launch package: `configs` or `slurm`. In a checkout it lies beside the package."""
    inside = Path(str(resources.files("launch"))) / folder
    return inside if inside.is_dir() else inside.parent.parent / folder


def preset_path(name: str) -> Path:
    """The file of a preset: a path to a YAML file, or `group/name` of the shipped ones.

    Raises: InputError with the presets of that group.
    """
    check_path("preset", name)
    if name.endswith((".yaml", ".yml")):
        if not Path(name).is_file():
            raise InputError(f"preset {name!r}: no such file")
        return Path(name)
    root = shipped("configs")
    path = root / f"{name}.yaml"
    if not path.is_file():
        known = sorted(str(p.relative_to(root).with_suffix("")) for p in root.glob("*/*.yaml"))
        near = [k for k in known if k.split("/")[0] == name.split("/")[0]] or known
        raise InputError(f"preset {name!r} is unknown. There are: {', '.join([*near, 'a path to a .yaml file'])}")
    return path


def preset_names(groups: Sequence[str]) -> list[str]:
    """The shipped presets of some groups, as `vae/tiny`."""
    root = shipped("configs")
    return sorted(f"{path.parent.name}/{path.stem}" for group in groups for path in (root / group).glob("*.yaml"))


def about_preset(name: str) -> str:
    """The first sentence of the preset's file."""
    lines = preset_path(name).read_text().splitlines()
    comment = itertools.takewhile(lambda line: re.match("# \\S", line), lines)  # its commands are set in
    text = " ".join(line.lstrip("# ") for line in comment)
    return re.split(r"(?<=[^.\d])[.;](?=\s|$)", text, maxsplit=1)[0].strip()


def check_presets(command: str, words: Sequence[str], groups: Sequence[str] | None) -> None:
    """Raises: InputError for a preset that there is not, or that is for another command. It reads the words alone, so
    that it takes no time.

    groups: those that are for the command. None where it can't be said
    """
    folders = {path.name for path in shipped("configs").iterdir() if path.is_dir()}
    for before, word in zip(["", *words], words):
        group, slash, _ = word.partition("/")
        if before.startswith("--") and "=" not in before:  # an option's value, as data/cells.h5ad, or after a flag
            continue
        if not slash or "=" in word or group not in folders or word.endswith((".yaml", ".yml")):
            continue
        preset_path(word)
        if groups is not None and group not in groups:
            raise InputError(
                f"preset {word!r} is not for {command}. It takes {', '.join(preset_names(groups)) or 'none'}"
            )


def load_preset(name: str) -> dict[str, Any]:
    """A preset as it stands in its file. Raises: InputError where that is not a YAML mapping."""
    path = preset_path(name)
    try:
        preset = _read(lambda text: OmegaConf.load(io.StringIO(text)), path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, OmegaConfBaseException, ValueError, OSError, RecursionError) as error:
        raise InputError(f"preset {name!r}: {path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(preset, dict):
        raise InputError(f"preset {name!r}: {path} must hold `key: value` lines")
    if with_nul := [key for key, text in _texts(preset) if "\0" in text]:
        raise InputError(f"preset {name!r}: {path}: {with_nul[0]} holds a NUL")
    return preset


# --- parse ---------------------------------------------------------------------------------------------------------


def compose(schema: type[Config], argv: Sequence[str]) -> Config:
    """The config of a command line: schema <- each preset in order <- each key=value, as a frozen dataclass.

    Raises: InputError with the dotted key for anything unknown, of the wrong type, out of range, or missing.
    """
    words = _added_up(schema, with_options_read(schema, argv))
    config = OmegaConf.structured(schema)
    while nested := [key for key in OmegaConf.missing_keys(config) if dataclasses.is_dataclass(_kind(schema, key))]:
        for key in nested:  # a nested config without a default: its own required keys are what is missing
            config = _merge(config, _at(key, OmegaConf.structured(_kind(schema, key))), key)
    for name in [word for word in words if "=" not in word]:
        config = _merge(config, load_preset(name), f"preset {name}")
    for override in [word for word in words if "=" in word]:
        config = _merge(config, _nested(schema, override), override)
    try:
        missing = sorted(OmegaConf.missing_keys(config))
        if missing:
            raise InputError(f"{missing[0]} must be given, as {missing[0]}=VALUE")
        for key, text in _texts(OmegaConf.to_container(config, resolve=True)):
            if (without := public(key, text)) != text:
                config = _merge(config, _at(key, without), key)
        check_ranges(config, schema)  # before the parts are made, which know no more than their own keys
        return typing.cast(Config, OmegaConf.to_object(config))
    except OmegaConfBaseException as error:  # text with `${`, where a number is wanted
        raise InputError(f"{error.full_key}: {str(error).splitlines()[0].partition(': ')[2]}") from None


def with_options_read(schema: type, argv: Sequence[str], only_known: bool = False) -> Iterator[tuple[str, bool]]:
    """Every word of a command line, an option (`--some-key value`) as `some_key=value`, and whether it was one.

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


def with_folders(schema: type, key: str, argv: Sequence[str]) -> list[str]:
    """A command line whose words without `=` are folders, with these as the value of a key."""
    told = list(with_options_read(schema, argv))
    folders = [word for word, is_option in told if not is_option and "=" not in word]
    rest = [word for word, is_option in told if is_option or "=" in word]
    return [*([f"{key}={json.dumps(folders)}"] if folders else []), *rest]


def _added_up(schema: type, words: Iterable[tuple[str, bool]]) -> list[str]:
    """The words of `with_options_read` alone. An option of a list that is given again adds to it."""
    out: list[str] = []
    at: dict[str, int] = {}
    for word, is_option in words:
        key, _, value = word.partition("=")
        is_list = is_option and typing.get_origin(_kind(schema, key)) in (tuple, list) and not value.startswith("[")
        if is_list and key in at:
            out[at[key]] += f",{value}"
            continue
        if is_list:
            at[key] = len(out)
        out.append(word)
    return out


def _kind(schema: type, dotted_key: str) -> Any:
    """The type of a key. None for one that the schema does not spell out."""
    kind: Any = schema
    for name in dotted_key.split("."):
        kind = _within(kind, name)
    return kind


def _within(kind: Any, name: str) -> Any:
    if dataclasses.is_dataclass(kind):
        return typing.get_type_hints(kind).get(name)
    return typing.get_args(kind)[1] if typing.get_origin(kind) is dict else None  # of a mapping, any key


def _is_text(kind: Any) -> bool:
    """Whether a type is text, or lists or mappings of text alone."""
    inner = [of for of in typing.get_args(kind) if of is not Ellipsis]
    is_group = typing.get_origin(kind) in (tuple, list, dict)
    return kind in (str, Path, str | None, Path | None) or (is_group and all(map(_is_text, inner)))


def _nested(schema: type, override: str) -> dict[str, Any]:
    """`a.b=value` as {"a": {"b": value}}. Text stays as typed (`1.10`, `yes`, `a: b`), in lists and mappings too, whose
    brackets, braces and quotes are YAML's. Other types are read as YAML."""
    key, _, text = override.partition("=")
    kind = _kind(schema, key)
    is_list = typing.get_origin(kind) in (tuple, list) and not text.startswith("[")
    value: Any
    if _is_text(kind) and typing.get_origin(kind) in (tuple, list, dict):
        if is_list:
            value = [part.strip() for part in text.split(",")] if text else []
        else:
            # every value is text as it stands there
            value = _parsed(lambda: yaml.load(text, Loader=yaml.BaseLoader), text, override)
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
    return _parsed(lambda: _read(lambda text: OmegaConf.from_dotlist([f"value={text}"]), text)["value"], text, override)


def _parsed(parse: Callable[[], Any], text: str, override: str) -> Any:
    try:
        return parse()
    except (yaml.YAMLError, OmegaConfBaseException, RecursionError) as error:
        raise InputError(f"{override}: {text!r} can't be read: {' '.join(str(error).split())}") from None


def _read(read: Callable[[str], Any], text: str) -> Any:
    """The plain values that OmegaConf reads from YAML text, of which `${` is no more than two characters.

    It would parse what follows. A preset of others could then print what is in the environment.
    """

    def restored(value: Any) -> Any:
        if isinstance(value, dict):
            return {restored(key): restored(of) for key, of in value.items()}
        if isinstance(value, list):
            return [restored(of) for of in value]
        return value.replace(DOLLAR, "${") if isinstance(value, str) else value

    return restored(OmegaConf.to_container(read(text.replace("${", DOLLAR)), resolve=False))


def _merge(config: DictConfig, other: Any, where: str) -> DictConfig:
    try:
        plain = _as_it_stands(other, OmegaConf.get_type(config))
    except InputError as error:
        raise InputError(str(error) if where in str(error) else f"{where}: {error}") from None
    try:
        return typing.cast(DictConfig, OmegaConf.merge(config, plain))
    except (OmegaConfBaseException, TypeError) as error:
        key = getattr(error, "full_key", "") or where.partition("=")[0]
        if type(error).__name__ == "ConfigKeyError":
            raise unknown_key(where, key, [k for k, *_ in flatten(OmegaConf.get_type(config) or dict)]) from None
        at = "" if where.startswith(f"{key}=") else f"{key}: "
        raise InputError(f"{where}: {at}{str(error).splitlines()[0]}") from None


def _as_it_stands(value: Any, kind: Any = None, key: str = "") -> Any:
    """Plain values, with every `${` escaped as OmegaConf wants it.

    kind: the type that the schema has there
    Raises: InputError for text in place of a group of keys, in which OmegaConf would look things up all the same.
    """
    if isinstance(value, str):
        if dataclasses.is_dataclass(kind) or typing.get_origin(kind) is dict:
            raise InputError(f"{key}={value!r} must be a group of keys, as {key}.KEY=VALUE")
        return re.sub(r"(\\*)\$\{", r"\1\1\\${", value)
    if isinstance(value, dict):
        return {name: _as_it_stands(of, _within(kind, name), f"{key}.{name}".strip(".")) for name, of in value.items()}
    return [_as_it_stands(of, None, key) for of in value] if isinstance(value, list) else value


def unknown_key(where: str, key: str, known: Sequence[str]) -> InputError:
    """The error that says so, with the nearest of the known keys.

    For another verb's key of PLACES, it lists the known ones of these.
    """
    same = [k for k in known if k.split(".")[-1] == key.split(".")[-1]]
    places = [k for k in PLACES if k in known]
    near = difflib.get_close_matches(key, known, n=3, cutoff=0.5) or same
    if key.replace("-", "_") in PLACES and not same and places:
        guess = f"Files and folders are named by {', '.join(f'{k}=' for k in places)} here"
    elif near:
        guess = f"Did you mean {', '.join(near)}?"
    else:
        guess = "--help lists the keys"
    return InputError(f"{where}: unknown key {key!r}. {guess}")


# --- passwords -----------------------------------------------------------------------------------------------------


def public(key: str, text: str) -> str:
    """A value as the config may keep it: a URL's password goes to the environment, for this process and its children.

    Raises: InputError for a key whose password has no place there.
    """
    if key in KEEPS_PASSWORD or re.match(r"[\w+.-]+://[^/?#@:\s]*:[^/?#]*\s", text):
        check_uri(key, text)
    without = without_passwords(text)
    if re.search(
        r"://(?!\[[\da-fA-F.]*:[\da-fA-F:.]*\](:\d+)?(/[^@]*)?$)[^\s/?#:]*:.*@", without, re.DOTALL
    ):  # whatever was not taken for a password
        raise InputError(
            f"{key}: what stands between its first `:` and its last `@` may be a password, and would be kept in files. "
            "Write a quote as %27, a comma as %2C, / as %2F, ? as %3F, # as %23, an `@` that ends no password as %40"
        )
    if without != text:
        if key not in KEEPS_PASSWORD:
            raise InputError(
                f"{key}={without}: a password in it would be kept in files. Give it where its client looks for it: in "
                "an environment variable, or a file of your own. An `@` that ends none is written %40"
            )
        os.environ[KEEPS_PASSWORD[key]] = text
    return without


def public_words(words: Sequence[str]) -> list[str]:
    """The words of a command line, likewise."""
    out = []
    for before, word in zip(["", *words], words):
        key, equals, text = ("", "", word) if re.match(r"[\w+.-]+://", word) else word.partition("=")
        if not equals:
            key, text = before, word
        out.append(f"{key}{equals}{public(key.lstrip('-'), text)}" if equals else public(key.lstrip("-"), text))
    return out


def _texts(values: Any) -> Iterator[tuple[str, str]]:
    """(dotted key, text) of all text. That of a list has the list's key."""
    for key, value in flat(values):
        yield from (
            (key, str(of)) for of in (value if isinstance(value, list) else [value]) if isinstance(of, str | Path)
        )


# --- help ----------------------------------------------------------------------------------------------------------


def flatten(schema: type) -> list[tuple[str, str, str, str]]:
    """Every dotted key of a schema with its type, its default and the line of its class's docstring about it."""
    rows = []
    for key, field, kind, value, text in declared(schema):
        if value is dataclasses.MISSING:
            default = "required"
        else:
            default = repr(value) if field.default_factory is not dataclasses.MISSING else str(value) or "empty"
        rows.append((key, kind, default, text))
    return rows


def declared(schema: type, prefix: str = "", made: Any = None) -> Iterator[tuple[str, Any, str, Any, str]]:
    """(dotted key, field, type, default, text about it) of every key. The default is MISSING where it must be given.

    made: what stands there by default, where the schema is a group of another's keys
    """
    hints = typing.get_type_hints(schema)
    texts = {}
    for kind in reversed(schema.__mro__):  # a config may add keys to another
        texts |= dict(re.findall(r"^ *(\w+): (.+(?:\n {4,}\S.*)*)", inspect.cleandoc(kind.__doc__ or ""), re.MULTILINE))
    for field in dataclasses.fields(schema):
        key, kind, value = f"{prefix}{field.name}", hints[field.name], field.default
        if made is not None:
            value = getattr(made, field.name)
        elif field.default_factory is not dataclasses.MISSING:
            value = field.default_factory()
        if dataclasses.is_dataclass(kind):
            yield from declared(typing.cast(type, kind), f"{key}.", value if dataclasses.is_dataclass(value) else None)
        else:
            is_missing = isinstance(value, str) and value == "???"
            text = " ".join(texts.get(field.name, "").split())
            yield key, field, _type_name(kind), dataclasses.MISSING if is_missing else value, text


def _type_name(kind: Any) -> str:
    if typing.get_origin(kind) is typing.Literal:
        return "|".join(map(str, typing.get_args(kind)))
    return str(kind).replace("typing.", "") if typing.get_origin(kind) else getattr(kind, "__name__", str(kind))


def help_text(
    command: str,
    purpose: str,
    schema: type,
    example: str,
    usage: str = "",
    groups: Sequence[str] = (),
    first: Sequence[str] = (),
) -> str:
    """What `COMMAND --help` prints: purpose, example, presets, every key with type, default and meaning.

    groups: of the presets that are for the command
    first: the keys that matter most, before all others
    """
    takes = " [PRESET ...]" if groups else ""
    lines = [
        f"usage: {usage or f'{command}{takes} [key=value ...]'}",
        "",
        purpose.strip(),
        "",
        "example:",
        *(f"  {line}" for line in example.strip().splitlines()),
        "",
    ]
    if groups:
        names = preset_names(groups)
        lines += ["presets, merged from left to right (or a path to a .yaml file):"]
        lines += [f"  {name:<{max(map(len, names))}}  {about_preset(name)}" for name in names]
        lines += [""]
    rows = {row[0]: row for row in flatten(schema)}
    spelling = "--some-key VALUE is another spelling of some_key=VALUE"
    lines += [f"keys that matter most ({spelling}):" if first else f"keys ({spelling}):"]
    for name in first:
        lines += _about_key(rows.pop(name))
    lines += ["", "all other keys:"] if first else []
    for row in rows.values():
        lines += _about_key(row)
    return "\n".join(lines)


def _about_key(row: tuple[str, str, str, str]) -> list[str]:
    key, kind, default, text = row
    return [f"  {key}  [{kind}; {default}]", *([f"      {text}"] if text else [])]
