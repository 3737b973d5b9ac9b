"""The `scldm` command: finds the verb, prints its help, turns an InputError into one line and exit code 2.

A verb is a module of this package with `PURPOSE`, `EXAMPLE`, `CONFIG` (its dataclass) and `main(config)`. It is
imported only when called, so that `scldm embed` needs neither deepspeed nor tiledbsoma.
"""

from __future__ import annotations

import difflib
import errno
import importlib
import os
import sys
from collections.abc import Sequence
from typing import Any

from launch.config import check_presets, compose, help_text
from launch.failure import note_failure
from launch.followed import followed, refused_early
from launch.keys import check_words, takes_folders
from launch.verbs import PRESETS, VERBS
from scldm.environment import install_hint, without_passwords
from scldm.errors import REFUSED, InputError
from scldm.files import no_space
from scldm.version import VERSION

READ_AT_ONCE = ("scldm status", "scldm plan", "scldm shards info")  # and perhaps piped into `head`


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line. Returns the exit code: 0, or 2 for an InputError."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] == ["--version"]:
        print(f"scldm {VERSION}")
        return 0
    if words[:1] == ["help"]:  # as git and others have it
        words = [*words[1:], "--help"]
    try:
        verb, rest = find_verb(words)
    except InputError as error:
        print(f"scldm: error: {without_passwords(str(error))}", file=sys.stderr)
        return REFUSED
    if verb is None:
        print(overview())
        return 0
    return run_verb(verb, rest)


def find_verb(words: Sequence[str]) -> tuple[str | None, list[str]]:
    """The verb that a command line begins with, and the words after it. None for no words or --help."""
    if not words or words[0] in ("-h", "--help"):
        return None, []
    for length in (2, 1):
        verb = " ".join(words[:length])
        if verb in VERBS:
            return verb, list(words[length:])
    begun = [verb for verb in VERBS if verb.split()[0] == words[0]]
    given = " ".join(words[: 2 if begun else 1])
    near = difflib.get_close_matches(" ".join(words[:2]), begun or VERBS, n=1, cutoff=0.8)
    near = near or difflib.get_close_matches(words[0], [] if begun else VERBS, n=1)
    guess = f"Did you mean {near[0]}? " if near else ""
    raise InputError(f"unknown verb {given!r}. {guess}There are: {', '.join(begun or VERBS)}")


def run_verb(verb: str, words: Sequence[str]) -> int:
    """Run one verb with the rest of its command line."""
    return run(f"scldm {verb}", VERBS[verb][0], words, None if verb == "submit" else PRESETS.get(verb, ()))


def run(command: str, module_name: str, words: Sequence[str], presets: Sequence[str] | None = None) -> int:
    """Run a module such as a verb's. `command` is how a user calls it, in its help and in messages.

    presets: the groups that are for it. None where its words say that
    """
    wants_help, began, place = "--help" in words or "-h" in words, False, ""
    try:
        if not wants_help:  # before what takes seconds to import
            if not takes_folders(command.removeprefix("scldm ")):
                check_presets(command, words, presets)
            if command.startswith("scldm "):
                check_words(command.removeprefix("scldm "), words)
        module = importlib.import_module(module_name)
        if wants_help:
            usage, first = getattr(module, "USAGE", ""), getattr(module, "FIRST", ())
            print(help_text(command, module.PURPOSE, module.CONFIG, module.EXAMPLE, usage, presets or (), first))
            return 0
        config = config_of(module, words)
        began, place = True, made_by(config)
        with followed(command.removeprefix("scldm "), config):
            module.main(config)
    except InputError as error:
        code = refuse(command, str(error), error.exit_code)
        if not began:
            refused_early(command.removeprefix("scldm "))
        return code
    except BrokenPipeError:  # as of `scldm help | head`
        if not (wants_help or command in READ_AT_ONCE):
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except Exception as error:
        if told := of_disk(error, place):
            return refuse(command, told)
        package = ((error.name or "") if isinstance(error, ModuleNotFoundError) else "").split(".")[0]
        if package in ("", "benchmarks", "data_pipeline", "launch", "scldm"):
            note_failure(1, without_passwords(f"{type(error).__name__}: {error}"), error.__traceback__)
            raise
        code = refuse(command, f"the package {package} is missing. {install_hint(package)}")
        if not began:
            refused_early(command.removeprefix("scldm "))
        return code
    return 0


def of_disk(error: Exception, made: str) -> str:
    """What is wrong with the disk, in a line. Empty for other errors.

    made: what the command makes, which is named where the error names no file
    """
    place = getattr(error, "filename", None) or (f"{made}, or a temporary file" if made else "a file")
    refusals = (errno.EROFS, errno.EACCES, errno.EISDIR, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP)
    if isinstance(error, OSError) and error.errno in refusals:
        return f"{place}: {os.strerror(error.errno)}"
    return no_space(error, place)


def refuse(command: str, why: str, code: int = REFUSED) -> int:
    why = without_passwords(why)
    print(f"{command}: error: {why}", file=sys.stderr)
    note_failure(code, why)
    return code


def config_of(module: Any, words: Sequence[str]) -> Any:
    """The config of a verb's words. A verb that takes other verbs' keys too has a `read`, which splits the words."""
    return module.read(words) if hasattr(module, "read") else compose(module.CONFIG, words)


def made_by(config: Any) -> str:
    """The file or folder that a verb makes. Empty for one that makes none, or a default one."""
    return getattr(config, "run_dir", "") or getattr(config, "out", "")


def overview() -> str:
    width = max(map(len, VERBS)) + 2
    lines = ["usage: scldm VERB [PRESET ...] [key=value ...]", "       scldm help VERB | scldm --version"]
    lines += ["", "verbs (scldm help VERB tells more):"]
    lines += [f"  {verb:<{width}}{text}" for verb, (_, text) in VERBS.items()]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
