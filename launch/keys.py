"""The keys of every verb with their kinds, kept in `keys.json`. What a command line says wrong by itself is refused,
and a key completed, before a verb's packages are imported, which takes seconds. `python -m launch.keys` writes the
file anew after a change of a config.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
from collections.abc import Sequence
from copy import copy
from functools import cache, partial
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from launch.config import PLACES, compose, declared, preset_names, unknown_key, with_folders, with_options_read
from launch.inputs import check_inputs
from launch.planned import check_sizes, stage_of
from launch.together import TOGETHER
from launch.verbs import PRESETS, VERBS
from scldm.checked import RANGE, Range
from scldm.errors import InputError

ANY = "*"  # alone it stands for the keys of other verbs. `control.*` stands for those of a mapping
BOUNDS = "@"  # after a kind: at least, above, at most and below, as `int@1,,3,`
PATH = Path(str(resources.files("launch"))) / "keys.json"


@cache
def kinds_of(verb: str) -> dict[str, list[Any]]:
    """Dotted key -> its kind as `--help` prints it, with BOUNDS of its numbers, and its default unless it must be
    given."""
    return json.loads(PATH.read_text(encoding="utf-8")).get(verb, {ANY: [""]})


def keys_of(verb: str) -> tuple[str, ...]:
    """Its keys, dotted. A mapping's end in `.*`, and `*` is among those of a verb that takes other verbs' keys."""
    return tuple(kinds_of(verb))


def takes_folders(verb: str) -> bool:
    """Whether its bare words are folders, not presets."""
    return ANY in keys_of(verb) and verb in VERBS and verb not in PRESETS and verb != "submit"


def check_words(verb: str, words: Sequence[str], there: bool = True) -> None:
    """Raises: InputError for a word that is no preset, an unknown key, or a required key that is missing. Also for a
    value of another kind or out of its range, and for a local file or folder that is not there. The verb's own config
    checks what keys say together. The words of a verb to be submitted are checked when its job is made.

    there: whether the files and folders that it reads must be there already
    """
    kinds, stage = verb, "vae"
    if verb == "plan":
        stage, words = stage_of(words)
        kinds = "plan" if stage == "vae" else "plan ldm"
    elif verb == "report":
        words = with_folders(config_of_kinds(verb), "runs", words)
    elif ANY in keys_of(verb):
        return
    keys = tuple(key for key in keys_of(kinds) if key != ANY)
    schema = config_of_kinds(kinds)
    told = [word for word, _ in with_options_read(schema, words)]
    for word in told:  # a preset's keys are not ours to name
        key, equals, _ = word.partition("=")
        if not equals or key in keys or any(k.startswith(f"{key}.") for k in keys):
            continue
        if not any(k.endswith(ANY) and key.startswith(k[:-1]) for k in keys):
            raise unknown_key(word, key, keys)
    shipped = preset_names(PRESETS.get(verb, ()))
    for word in told:
        if "=" not in word and word not in shipped and not word.endswith((".yaml", ".yml")):
            places = ", ".join(f"{key}=" for key in PLACES if key in keys)
            known = f"There are {', '.join(shipped)}. " if shipped else ""
            raise InputError(f"{word!r} is no preset. {known}Files and folders are named by {places} here")
    config = compose(schema, words)
    for check in TOGETHER.get(kinds, ()):
        check(config)
    if verb == "plan" and not (config.data.shards or getattr(config, "vae", "")):
        check_sizes(config, stage)
    if there and not os.environ.get("SCLDM_STAGED"):  # a job that staged shards reads them elsewhere
        check_inputs(kinds, config)


# --- the config of the kinds alone ---------------------------------------------------------------------------------


@cache
def config_of_kinds(verb: str) -> type:
    """A dataclass with the verb's keys and their kinds, which takes what the verb's own takes, and more."""
    tree: dict[str, Any] = {}
    for dotted, said in kinds_of(verb).items():
        if dotted == ANY:
            continue
        *above, name = dotted.removesuffix(f".{ANY}").split(".")
        at = tree
        for group in above:
            at = at.setdefault(group, {})
        at[name] = said
    return _made(verb.title().replace(" ", ""), tree)


def _made(name: str, tree: dict[str, Any]) -> type:
    fields: list[tuple[str, Any, Any]] = []
    for key, of in tree.items():
        if isinstance(of, dict):
            kind = _made(f"{name}_{key}", of)
            required = any(f.default is f.default_factory is dataclasses.MISSING for f in dataclasses.fields(kind))
            default: Any = {} if required else {"default_factory": kind}
        else:
            text, bounded, bounds = of[0].partition(BOUNDS)
            kind, default = _kind(text), {}
            if of[1:]:
                default = {"default_factory": partial(copy, of[1])}  # a list is made anew
            if bounded and kind is not Any:
                default["metadata"] = {
                    RANGE: Range(*(json.loads(bound) if bound else None for bound in bounds.split(",")))
                }
        fields.append((key, kind, dataclasses.field(**default, kw_only=True)))
    return dataclasses.make_dataclass(name, fields, frozen=True)


def _kind(text: str) -> Any:
    """A kind that `--help` prints."""
    known = {"bool": bool, "int": int, "float": float, "str": str, "int | None": int | None}
    known |= {"tuple[str, ...]": list[str], "list[str]": list[str], "tuple[float, ...]": list[float]}
    known |= {"dict[str, str]": dict[str, str], "dict[str, float]": dict[str, float]}
    known |= {"dict[str, list[str]]": dict[str, list[str]]}
    if text.startswith(("tuple", "list", "dict")) or text in known:
        return known.get(text, Any)
    return Literal[tuple(text.split("|"))]


# --- the file ------------------------------------------------------------------------------------------------------


def _noted(key: str, field: Any, kind: str, default: Any) -> tuple[str, list[Any]]:
    """What the file says of a key: its kind, BOUNDS of its numbers, and its default, unless it must be given."""
    of, bounds = field.metadata.get(RANGE), ""
    if of is not None:
        bounds = BOUNDS + ",".join("" if bound is None else f"{bound}" for bound in dataclasses.astuple(of))
    said = [] if default is dataclasses.MISSING else [default]
    return f"{key}.{ANY}" if kind.startswith("dict[") else key, [kind + bounds, *said]


def found() -> dict[str, dict[str, list[Any]]]:
    """The keys of every verb, as its config has them now."""
    keys: dict[str, dict[str, list[Any]]] = {}
    for verb, (name, _) in VERBS.items():
        module: Any = importlib.import_module(name)
        for told, schema in {verb: module.CONFIG, **getattr(module, "OTHER_CONFIGS", {})}.items():
            keys[told] = dict(_noted(*of) for *of, _ in declared(schema))
            keys[told] |= {ANY: [""]} if hasattr(module, "read") else {}
    return json.loads(json.dumps(keys))


if __name__ == "__main__":
    lines = (f"{json.dumps(verb)}: {json.dumps(keys)}" for verb, keys in found().items())
    PATH.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
