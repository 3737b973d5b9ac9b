"""`scldm report` on real runs: what it says is what their files say, and a weakness is named where there is one."""

from __future__ import annotations

import html
import json
import re
import shutil
from pathlib import Path

import pytest

from data_pipeline.format.read_shards import manifest_hash
from data_pipeline.format.schema import read_manifest
from launch.cli import main
from launch.report import evaluations, facts
from scldm.files import write_json
from scldm.train import changes
from scldm.train.tracking import read_metrics
from tests.data_pipeline.small_sets import write_set
from tests.launch.test_gate import cells, train

pytestmark = pytest.mark.heavy


@pytest.fixture(scope="module")
def at(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A set, a run on it that was started twice, another with another seed, and an evaluation of the first."""
    folder = tmp_path_factory.mktemp("report <b>")
    write_set(folder / "set", cells(test=True), block_cells=32)
    for _ in range(2):
        train(folder, "vae", "train.steps=100", "tracking.enabled=true")
    train(folder, "other", "train.steps=50", "train.seed=1")
    words = [f"vae={folder}/vae", f"shards={folder}/set", f"out={folder}/scores"]
    assert main(["evaluate", *words]) == 0
    return folder


def shown(page: Path) -> str:
    """The text of a page."""
    text = page.read_text()
    assert not re.search(r'(src|href)="(?!data:|#)', text)  # nothing is fetched
    assert "<b>/" not in text  # of the folder's name
    return html.unescape(re.sub(r"<[^>]*>", " ", re.sub(r"(?s)<(style|script).*?</\1>", "", text)))


def test_a_page_says_what_the_files_of_the_run_say(at: Path, capsys: pytest.CaptureFixture) -> None:
    capsys.readouterr()
    assert main(["report", f"{at}/vae"]) == 0
    said, text = capsys.readouterr().out, shown(at / "vae" / "run.html")
    best = min(read_metrics(at / "vae", "validation"), key=lambda row: row["nll"])
    headline = f"FINISHED; step 100 of 100, 5,000 cells seen; nll {best['nll']:.4g} at step {best['step']}"
    assert f"{at}/vae: {headline}\n" in said
    starts = json.loads((at / "vae" / "environment.json").read_text())
    evaluation = json.loads((at / "scores" / "evaluation.json").read_text())
    for told in (
        *(headline, manifest_hash(read_manifest(f"{at}/set")), starts[1]["versions"]["torch"]),
        *(json.loads((at / "vae" / "gate.json").read_text())["line"], evaluation["verdict"]),
        *(f"{evaluation['scores']['model']['re']['mean']:.1f}", "type (3 labels)", "optim.lr"),
    ):
        assert told in text, told
    assert re.search(r"starts\s+2\s", text)
    assert "data:image/png;base64," in (at / "vae" / "run.html").read_text()


def test_two_runs_stand_beside_each_other_with_what_differs(at: Path) -> None:
    assert main(["report", f"{at}/vae", f"{at}/other", f"out={at}/both.html"]) == 0
    different, same = shown(at / "both.html").split("different ")[1].split("the same ")
    assert re.search(r"train\.seed\s+0\s+1\s", different)
    assert re.search(r"train\.steps\s+100\s+50\s", different)
    assert re.search(r"optim\.lr\s+0\.01\s+0\.01\s", same)


def test_an_evaluation_of_another_run_is_not_this_ones(at: Path) -> None:
    assert [path.parent.name for path, _ in evaluations(at / "vae")] == ["scores"]
    assert not list(evaluations(at / "other"))


def test_weaknesses_and_changes_are_named(at: Path, tmp_path: Path) -> None:
    run = tmp_path / "vae"
    shutil.copytree(at / "vae", run)
    starts = json.loads((run / "environment.json").read_text())
    write_json(run / "environment.json", [start | {"git": "0" * 40} for start in starts])
    sound, rows = facts(run)["weak"], read_metrics(run)
    (run / "metrics.jsonl").write_text("".join(json.dumps(row | {"waiting_share": 0.5}) + "\n" for row in rows))
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({**rows[-1], "step": 101, "split": "validation", "nll": 999.0}) + "\n")
    write_json(run / "environment.json", [start | {"git": "0" * 40 + "-dirty"} for start in starts])
    write_json(run / "gate.json", {**json.loads((run / "gate.json").read_text()), "passed": False, "line": "no better"})
    (run / "nonfinite.jsonl").write_text('{"step": 3}\n{"step": 3}\n{"step": 4}\n')
    changes.note(run, 50, {"optim.lr": (0.01, 0.001)})
    found = facts(run)
    told = "\n".join(text for text in found["weak"] if text not in sound)
    for part in (
        "no better",
        "to 999: it overfits",
        "50% of the time",
        "2 steps were skipped",
        "differed from the commit",
    ):
        assert part in told, part
    assert "at step 50: optim.lr was 0.01, is 0.001" in found["groups"]["starts and changes"].values()


def test_a_run_that_logged_nothing_has_a_page(at: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    shutil.copy(at / "vae" / "config.json", tmp_path / "run")
    assert main(["report", str(tmp_path / "run")]) == 0
    text = shown(tmp_path / "run" / "run.html")
    assert "No row was logged yet." in text
    assert "It was never validated." in text


def test_a_page_in_no_folder_is_refused_by_what_was_given(at: Path, tmp_path: Path, capsys) -> None:
    assert main(["report", str(at / "vae"), f"out={tmp_path}/no/page.html"]) == 2
    assert f"{tmp_path}/no/page.html: {tmp_path}/no is no folder. Make it, or" in capsys.readouterr().err


def test_what_is_no_run_is_refused(at: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    three = [tmp_path, tmp_path / "b", tmp_path / "c"]
    for run in three:
        run.mkdir(exist_ok=True)
        (run / "config.json").write_text("{}")
    told = ", ".join(map(str, three))
    for words, why in (
        ([f"{at}/set"], f"{at}/set is not a run folder: it has no config.json"),
        ([str(tmp_path)], f"{tmp_path} is not the folder of a training run"),
        ([*map(str, three)], f"runs={told}: give the folder of one run, or of two different ones"),
        ([], "runs must be given"),
    ):
        assert main(["report", *words]) == 2
        assert why in capsys.readouterr().err
