"""The keys of every verb, kept in `keys.json`: an unknown key is refused, and a key completed, before a verb's packages
are imported, which takes seconds. `python -m launch.keys` writes the file anew after a change of a config.

Reading order: keys_of, check_keys, found.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Sequence
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from launch.config import flatten, preset_path, unknown_key
from launch.verbs import VERBS

ANY = "*"  # alone it stands for the keys of other verbs. `control.*` stands for those of a mapping
PATH = Path(str(resources.files("launch"))) / "keys.json"


@cache
def keys_of(verb: str) -> tuple[str, ...]:
    """Its keys, dotted. A mapping's end in `.*`, and `*` is among those of a verb that takes other verbs' keys."""
    return tuple(json.loads(PATH.read_text(encoding="utf-8")).get(verb, [ANY]))


def check_keys(verb: str, words: Sequence[str]) -> None:
    """Raises: InputError for the first `key=value` whose key the verb does not have, or word that is no preset."""
    keys = keys_of(verb)
    if ANY in keys:
        return
    for before, word in zip(["", *words], words):
        key, equals, _ = word.partition("=")
        if not (equals or word.startswith("-") or (before.startswith("--") and "=" not in before)):
            preset_path(word)
        if not equals or word.startswith("--") or key in keys or any(k.startswith(f"{key}.") for k in keys):
            continue
        if not any(k.endswith(ANY) and key.startswith(k[:-1]) for k in keys):
            raise unknown_key(word, key, keys)


def found() -> dict[str, list[str]]:
    """The keys of every verb, as its config has them now."""
    keys: dict[str, list[str]] = {}
    for verb, (name, _) in VERBS.items():
        module: Any = importlib.import_module(name)
        keys[verb] = [f"{key}.{ANY}" if kind.startswith("dict[") else key for key, kind, *_ in flatten(module.CONFIG)]
        keys[verb] += [ANY] if hasattr(module, "read") else []
    return keys


if __name__ == "__main__":
    lines = (f"{json.dumps(verb)}: {json.dumps(keys)}" for verb, keys in found().items())
    PATH.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
