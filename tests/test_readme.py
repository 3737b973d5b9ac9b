"""What the texts promise exists: the README's commands and files, the presets, the modules that slurm/ names."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import itertools
import re
import shlex
import shutil
import tomllib
from pathlib import Path
from types import ModuleType

import pytest

from launch import cli
from launch.cli import find_verb
from launch.config import compose, preset_path
from launch.verbs import PRESETS, VERBS
from scldm.errors import LOST, REFUSED, REQUEUE, STOPPED, InputError

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
PAGES = [README, *(ROOT / f"{name}.md" for name in ("ARCHITECTURE", "CONTRIBUTING", "benchmarks/speedrun"))]
PAGES += [ROOT / f"{room}/README.md" for room in ("benchmarks", "data_pipeline", "slurm")]
PAGES += sorted((ROOT / "docs").glob("*.md"))
PLAIN = {"git", "cd", "export", "deactivate"}  # commands that name nothing of ours
# group of presets -> the verbs that they are for; `plan` takes those of a run, with keys of its own
VERBS_OF = {
    group: [verb for verb, groups in PRESETS.items() if group in groups and verb != "plan"]
    for group in sorted({group for groups in PRESETS.values() for group in groups})
}


# --- commands ---


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def commands(text: str) -> list[list[str]]:
    """The words of every command in the bash blocks; lines joined at backslashes, comments left out."""
    found = []
    for block in blocks(text, "(?:bash|sh|console)"):
        for line in block.replace("\\\n", " ").splitlines():
            for part in re.split(r"\s(?:&&|;|\|)\s", line.removeprefix("$ ")):
                if words := shlex.split(part, comments=True):
                    found.append(words)
    return found


def problem(words: list[str]) -> str:
    """Why a command can't work here; empty where its verb, keys, presets, modules, extras and files exist."""
    while words and re.fullmatch(r"\w+=\S*", words[0]):
        words = words[1:]  # environment variables before the command
    program, rest = (words[0], words[1:]) if words else ("", [])
    if program == "scldm":
        return problem_of_verb(rest)
    if rest and rest[0] == "launch/quickstart.sh":
        return problem_of_verb(["quickstart", *rest[1:]])
    if program in ("bash", "source", ".") and rest:
        return "" if (ROOT / rest[0]).is_file() or ".venv/" in rest[0] else f"no file {rest[0]}"
    if program in ("torchrun", "srun") and "scldm" in rest:  # --no-python: a user's own launch.py is no way to ours
        return problem_of_verb(rest[rest.index("scldm") + 1 :])
    if "-m" in rest and program in ("python", "python3", "torchrun", "srun"):
        module, *arguments = rest[rest.index("-m") + 1 :]
        if module == "pip":
            return problem_of_install(arguments)
        if module in (name for name, _ in VERBS.values()):
            return f"{module} is no command: a verb is run by the scldm command"
        if not importlib.util.find_spec(module):
            return f"no module {module}"
        if module.startswith("benchmarks.") and hasattr(found := importlib.import_module(module), "CONFIG"):
            return problem_of_words(found, arguments)
        return ""
    if program == "pip":
        return problem_of_install(rest)
    if program in ("pytest", "ruff"):
        lost = [word for word in rest if "/" in word and not (ROOT / word.split("::")[0]).exists()]
        return f"no file {lost[0]}" if lost else ""
    return "" if program in PLAIN or shutil.which(program) else f"nothing is known about {program!r}"


def config_of(verb: str) -> type:
    return importlib.import_module(VERBS[verb][0]).CONFIG


def problem_of_verb(words: list[str]) -> str:
    try:
        verb, rest = find_verb(words)
    except InputError as error:
        return str(error)
    return "" if verb is None else problem_of_words(importlib.import_module(VERBS[verb][0]), rest)


def problem_of_words(module: ModuleType, words: list[str]) -> str:
    try:
        if "--help" not in words:
            cli.config_of(module, words)
    except InputError as error:
        return "" if str(error).endswith("no such file") else str(error)  # a page's files are its reader's
    return ""


def problem_of_install(words: list[str]) -> str:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for option, value in itertools.pairwise(words):
        if option in ("-c", "-r") and not (ROOT / value).is_file():
            return f"no file {value}"
    for word in words:
        unknown = set(re.findall(r"\w+", (re.findall(r"\[(.+)\]", word) or [""])[0])) - set(extras)
        if unknown:
            return f"no extra {unknown.pop()}"
        if word.split("[")[0] == "scldm":
            return "scldm on the public index is another project"
    return ""


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_command_of_a_page_resolves(page: Path) -> None:
    wrong = {shlex.join(words): why for words in commands(page.read_text()) if (why := problem(words))}
    assert wrong == {}


@pytest.mark.parametrize(
    "line, why",
    [
        ("bash launch/none.sh --x", "no file launch/none.sh"),
        ("bash launch/quickstart.sh --h5 cells.h5ad", "unknown key 'h5'"),
        ("FOO=1 scldm train gan", "unknown verb 'train gan'"),
        ("scldm train vae vae/none", "preset 'vae/none' is unknown"),
        ("scldm train vae \\\n  no.such=1", "unknown key"),
        ("cd x && torchrun --nproc-per-node 2 -m launch.none vae/tiny", "no module launch.none"),
        ("torchrun --standalone --no-python scldm train vae no.such=1", "unknown key"),
        ("torchrun --no-python --nproc-per-node 2 scldm train gan", "unknown verb 'train gan'"),
        ("srun --ntasks 2 scldm train vae vae/none", "preset 'vae/none' is unknown"),
        ("python -m benchmarks.mcab no.such=1", "unknown key"),
        ("srun --ntasks 2 python -m launch.train_vae vae/tiny", "launch.train_vae is no command"),
        ('pip install -e ".[gpu]"', "no extra gpu"),
        ("python3 -m pip install -c nothing.txt .", "no file nothing.txt"),
        ("pip install scldm", "another project"),
        ("frobnicate runs  # what is this", "nothing is known about 'frobnicate'"),
        ("pytest tests/test_none.py", "no file tests/test_none.py"),
    ],
)
def test_a_command_that_can_not_work_is_found(line: str, why: str) -> None:
    found = [problem(words) for words in commands(f"text\n```bash\n{line}\n```\n")]
    assert any(why in text for text in found), found


def test_the_python_of_the_readme_names_what_exists() -> None:
    import scldm

    for block in blocks(README.read_text(), "python"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                if node.value.id == "scldm":
                    assert hasattr(scldm, node.attr), f"scldm.{node.attr}"
                elif node.value.id == "model":
                    assert hasattr(scldm.Pretrained, node.attr), f"model.{node.attr}"


def test_a_page_lists_the_exit_codes() -> None:
    told = [int(code) for code in re.findall(r"^\| (\d+) \|", (ROOT / "docs/runs.md").read_text(), re.MULTILINE)]
    assert told == [0, 1, REFUSED, REQUEUE, STOPPED, LOST]


# --- files ---


def map_of(text: str) -> list[str]:
    """The files and folders that a map names: `path  what it is`, indented under its folder."""
    section = re.search(r"^#+ [^\n]*\bmap\b[^\n]*\n(.*?)(?=^#+ |\Z)", text, re.DOTALL | re.MULTILINE | re.IGNORECASE)
    found: list[str] = []
    folders: list[tuple[int, str]] = []
    for line in section.group(1).splitlines() if section else []:
        if not line.strip() or line.startswith("```"):
            continue
        indent = len(line) - len(line.lstrip())
        folders = [(depth, folder) for depth, folder in folders if depth < indent]
        names = re.split(r"\s{2,}", line.strip())[0].split() if "`" not in line else re.findall(r"`([^`]+)`", line)
        for name in names:
            name = name.rstrip(",")
            if not re.fullmatch(r"[\w.-]*[/.][\w./-]*", name):
                continue
            path = f"{folders[-1][1] if folders else ''}{name}"
            found.append(path)
            if name.endswith("/"):
                folders.append((indent, path))
    return found


def test_every_file_of_the_map_exists() -> None:
    named = map_of((ROOT / "ARCHITECTURE.md").read_text())
    assert len(named) > 10
    assert [path for path in named if not (ROOT / path).exists()] == []


def test_the_map_is_read_in_both_ways_of_writing() -> None:
    text = "# x\n## Map\n```\nscldm/  library\n  batch.py  e.g. this\n  train/  a b\n"
    text += "    loop.py ema.py  c\nlaunch/  d\n```\n"
    text += "- `a/b.py`: c\n# y\n- `c.py` is not in the map\n"
    expected = ["scldm/", "scldm/batch.py", "scldm/train/", "scldm/train/loop.py", "scldm/train/ema.py", "launch/"]
    assert map_of(text) == [*expected, "a/b.py"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_to_a_file_leads_somewhere(page: Path) -> None:
    links = [link for link in re.findall(r"\]\(([^)#\s]+)", page.read_text()) if "://" not in link]
    assert [link for link in links if not (page.parent / link).exists()] == []


def test_every_module_named_in_slurm_exists() -> None:
    for path in sorted(p for p in (ROOT / "slurm").rglob("*") if p.is_file()):
        for module in re.findall(r"-m\s+((?:launch|scldm|data_pipeline)[\w.]*)", path.read_text()):
            assert importlib.util.find_spec(module), f"{path.name} names {module}"


# --- presets ---

PRESETS = sorted(str(p.relative_to(ROOT / "configs").with_suffix("")) for p in (ROOT / "configs").glob("*/*.yaml"))


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_loads_with_its_verb_and_opens_with_what_it_is(name: str) -> None:
    assert preset_path(name).read_text().startswith("# "), f"{name} must open with its command, hardware, time, result"
    for verb in VERBS_OF[name.split("/")[0]]:
        words = [name, *(["n=1"] if verb == "generate" else [])]  # one of four ways to say which cells
        while required := required_besides(verb, words):
            words.append(f"{required}=1")


def required_besides(verb: str, words: list[str]) -> str:
    """A key that the verb asks for besides these words; empty where it loads. Raises: InputError for all else."""
    try:
        compose(config_of(verb), words)
    except InputError as error:
        if match := re.match(r"(\S+) must be given", str(error)):
            return match[1]
        raise
    return ""
