"""Command line -> frozen config: what is merged in which order, what stays as typed, and what each mistake says."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, dataclass, field
from pathlib import Path
from typing import Literal

import pytest
import yaml

from launch import config as launch_config
from launch.config import compose, flatten, help_text
from scldm.errors import InputError


@dataclass(frozen=True)
class Optim:
    """How to step.

    lr: learning rate
    betas: decay of both moments
    kind: which optimizer
    """

    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.95)
    kind: Literal["adamw", "sgd"] = "adamw"


@dataclass(frozen=True)
class Config:
    """A verb's config.

    out: folder that is
        written
    steps: optimizer steps
    """

    out: str
    steps: int = 50_000
    seed: int | None = None
    label: str | None = None
    by: tuple[str, ...] = ()
    only: dict[str, list[str]] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)
    weights: dict[str, float] = field(default_factory=dict)
    where: Path = Path("here")
    fresh: bool = False
    optim: Optim = field(default_factory=Optim)

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise InputError(f"steps: {self.steps} must be at least 1")


@dataclass(frozen=True)
class Nested:
    """A config that requires another.

    optim: with a default
    inner: without one
    """

    inner: Config
    optim: Optim = field(default_factory=Optim)


def test_a_nested_config_without_a_default_asks_for_its_own_keys() -> None:
    with pytest.raises(InputError, match=r"inner\.out must be given, as inner\.out=VALUE"):
        compose(Nested, ["inner.steps=3"])
    assert compose(Nested, ["inner.out=a", "inner.optim.lr=0.5"]).inner == Config("a", optim=Optim(lr=0.5))


@pytest.fixture
def presets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two presets of group `vae` and one of `hardware` in place of the shipped ones."""
    for name, text in {
        "vae/tiny": "# A small one of 3.5 million: for\n# a CPU. Open.\n#   scldm try\nsteps: 10\noptim: {lr: 0.5}\n",
        "vae/other": "steps: 20\n",
        "hardware/cpu": "optim:\n  kind: sgd\n",
    }.items():
        path = tmp_path / "configs" / f"{name}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    monkeypatch.setattr(launch_config, "shipped", lambda folder: tmp_path / folder)
    return tmp_path / "configs"


def test_presets_merge_left_to_right_and_overrides_win(presets: Path) -> None:
    config = compose(Config, ["vae/tiny", "out=runs/a", "vae/other", "hardware/cpu", "optim.betas=0.8,0.9"])
    assert config == Config("runs/a", steps=20, optim=Optim(lr=0.5, betas=(0.8, 0.9), kind="sgd"))
    assert compose(Config, ["steps=3", "vae/tiny", "out=a"]).steps == 3
    assert compose(Config, [str(presets / "vae/tiny.yaml"), "out=a"]).steps == 10
    with pytest.raises(FrozenInstanceError):
        config.steps = 1  # type: ignore[misc]


def test_dashes_are_another_spelling() -> None:
    config = compose(Config, ["--out", "a", "--fresh", "--optim.lr", "0.25", "--by", "x, y", "--seed=7"])
    assert config == Config("a", seed=7, by=("x", "y"), fresh=True, optim=Optim(lr=0.25))


@pytest.mark.parametrize(
    "text",
    [
        "1.10",
        "yes",
        "007",
        "2025-01-30",
        "a: b",
        "{a",
        "[a]",
        "x == 'B cell'",
        "",
        "5e4",
        "a${b}c",
        "${out}",
        "${",
        "\\${a}",
    ],
)
def test_text_stays_as_typed(text: str) -> None:
    config = compose(Config, [f"out={text}", f"label={text}", f"where={text}", f"by=k,{text}"])
    assert (config.out, config.label, config.where, config.by) == (text, text, Path(text), ("k", text))


@pytest.mark.parametrize(
    "text, labels",
    [
        ("0.10,1e-3,true", ["0.10", "1e-3", "true"]),
        ("[0.10, 1e-3,true,null,0x1F,1_000]", ["0.10", "1e-3", "true", "null", "0x1F", "1_000"]),
        ("""["a, b",'c: d',e f]""", ["a, b", "c: d", "e f"]),
        ("007", ["007"]),
        ("[]", []),
        ("", []),
    ],
)
def test_labels_stay_as_typed_in_lists(text: str, labels: list[str]) -> None:
    config = compose(Config, ["out=a", f"only.dose={text}", f"by={text}", f"only.cell type={text}"])
    assert (config.only, config.by) == ({"dose": labels, "cell type": labels}, tuple(labels))


def test_mappings_are_given_by_key_or_as_a_whole() -> None:
    config = compose(Config, ["out=a", "only={x: [0.10, yes]}", "files.x=1.10", "weights.x=2", "weights.y=1e-1"])
    assert (config.only, config.files) == ({"x": ["0.10", "yes"]}, {"x": "1.10"})
    assert config.weights == {"x": 2, "y": 0.1}


def test_none_is_null_and_a_tuple_can_be_empty() -> None:
    config = compose(Config, ["out=a", "seed=3", "seed=null", "label=null", "by=a", "by="])
    assert (config.seed, config.label, config.by) == (None, None, ())


@pytest.mark.parametrize(
    "words, said",
    [
        (["steps=3"], "out must be given, as out=VALUE"),
        (["out=a", "step=3"], "step=3: unknown key 'step'. Did you mean steps"),
        (["out=a", "optim.lrr=3"], "unknown key 'optim.lrr'. Did you mean optim.lr"),
        (["out=a", "lr=3"], "unknown key 'lr'. Did you mean optim.lr"),
        (["out=a", "steps=x"], "steps=x: Value 'x'"),
        (["out=a", "steps=5e4"], "steps=5e4: "),
        (["out=a", "steps=[1"], "steps=[1: "),
        (["out=a", "by=[1"], "by=[1: '[1' can't be read"),
        (["out=a", "only.x=[[a],b]"], "only.x=[[a],b]: "),
        (["out=a", "only=a"], "only=a: "),
        (["out=a", "only.x.y=a"], "only.x.y=a: "),
        (["out=a", "optim.kind=adam"], "optim.kind=adam: Invalid value 'adam', expected one of ['adamw', 'sgd']"),
        (["out=a", "optim.betas=0.1"], "optim.betas=0.1: "),
        (["out=a", "optim.betas=a,b"], "optim.betas=a,b: "),
        (["out=a", "optim.betas.0=3"], "optim.betas.0=3: "),
        (["out=a", "steps=0"], "steps: 0 must be at least 1"),
        (["out=a", "--steps"], "--steps needs a value"),
        (["--out", "--fresh"], "--out needs a value"),
        (["out=a", "vae/tini"], "preset 'vae/tini' is unknown. There are: vae/other, vae/tiny, a path"),
        (["out=a", "tiny"], "preset 'tiny' is unknown. There are: hardware/cpu, vae/other"),
        (["out=a", "none.yaml"], "preset 'none.yaml': no such file"),
        (["out=a", "=3"], "=3: unknown key ''"),
    ],
)
def test_a_mistake_is_one_line_with_its_key(presets: Path, words: list[str], said: str) -> None:
    with pytest.raises(InputError) as error:
        compose(Config, words)
    assert said in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "content, said",
    [
        (b"optim: {lrr: 1}", "unknown key 'optim.lrr'. Did you mean optim.lr"),
        (b"optim: {lr: fast}", "optim.lr: Value 'fast'"),
        (b"a: [1", "is not YAML"),
        (b"- 1", "must hold `key: value` lines"),
        (b"\xff\xfe\x00", "is not YAML"),
        (b'optim: {lr: 1}\nby: ["b", "a\\0b"]', "by holds a NUL"),
        (b"steps: " + b"9" * 5_000, "is not YAML: Exceeds the limit"),
        (b"1: 2", "unknown key '1'"),
        (b"optim: {1: 2}", "unknown key 'optim.1'"),
    ],
)
def test_a_broken_preset_is_named(tmp_path: Path, content: bytes, said: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_bytes(content)
    with pytest.raises(InputError) as error:
        compose(Config, [str(path), "out=a"])
    assert said in str(error.value)
    assert "mine.yaml" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.heavy
def test_nothing_of_a_value_is_looked_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A preset of others could print what is in the environment."""
    monkeypatch.setenv("SECRET", "geheim")
    texts = ("${oc.env:SECRET}", "a${b}c", "${", "}${steps}", "${oc.env:SECRET", "\\\\${steps}\\")
    for text in texts:
        lines = {"label": text, "by": [text], "only": {"k": [text]}, "files": {text: text}}
        (tmp_path / "mine.yaml").write_text(yaml.safe_dump(lines))
        config = compose(Config, [str(tmp_path / "mine.yaml"), f"out={text}"])
        assert (config.label, config.by, config.only, config.files) == (text, (text,), {"k": [text]}, {text: text})
        with pytest.raises(
            InputError, match=r"^steps: Value .* could not be converted to Integer|^steps=.*can't be read"
        ):
            compose(Config, ["out=a", f"steps={text}"])
        for key in ("optim", "only"):
            with pytest.raises(InputError, match=rf"^{key}=.*(must be a group of keys|can't be read)") as refusal:
                compose(Config, ["out=a", f"{key}={text}"])
            assert "geheim" not in str(refusal.value)


def test_help_shows_every_key_with_type_default_and_meaning(presets: Path) -> None:
    assert flatten(Config)[0] == ("out", "str", "required", "folder that is written")
    text = help_text("try", "Tries.", Config, "scldm try out=a", groups=("hardware", "vae"), first=("steps",))
    assert text.index("  steps  [") < text.index("all other keys:") < text.index("  out  [")
    assert text.count("  steps  [") == 1
    assert "usage: try [PRESET" in text
    assert "presets" not in help_text("try", "Tries.", Config, "scldm try out=a")
    for part in (
        "steps  [int; 50000]\n      optimizer steps",
        "optim.kind  [adamw|sgd; adamw]\n      which optimizer",
        "optim.betas  [tuple[float, float]; (0.9, 0.95)]",
        "  hardware/cpu  \n  vae/other     \n  vae/tiny      A small one of 3.5 million: for a CPU\n",
        "Tries.",
        "  scldm try out=a",
    ):
        assert part in text


@pytest.mark.parametrize(
    "words, by",
    [
        (["--by", "a", "--by", "b"], ("a", "b")),
        (["--by=a", "--by", "b,c"], ("a", "b", "c")),
        (["--by", "a", "by=b"], ("b",)),  # key=value assigns
        (["by=b", "--by", "a"], ("a",)),
    ],
)
def test_an_option_of_a_list_given_again_adds_to_it(words: list[str], by: tuple[str, ...]) -> None:
    assert compose(Config, ["out=a", *words]).by == by


def test_an_option_of_no_list_given_again_is_the_last() -> None:
    assert compose(Config, ["out=a", "--steps", "3", "--steps", "4"]).steps == 4


@pytest.mark.parametrize(
    "words, groups, said",
    [
        (["vae/tinny", "out=a/b"], ["vae"], "preset 'vae/tinny' is unknown"),
        (["vae/tiny"], ["hardware"], "preset 'vae/tiny' is not for try. It takes hardware/cpu"),
        (["vae/tiny"], [], "preset 'vae/tiny' is not for try. It takes none"),
        (["vae/tiny", "own/file.yaml", "out=vae/none", "runs/vae", "--out", "runs/a"], ["vae"], ""),
        (["train", "vae", "vae/tiny"], None, ""),
    ],
)
def test_presets_are_checked_by_the_words_alone(presets: Path, words: list[str], groups, said: str) -> None:
    if not said:
        launch_config.check_presets("try", words, groups)
        return
    with pytest.raises(InputError, match=said):
        launch_config.check_presets("try", words, groups)
