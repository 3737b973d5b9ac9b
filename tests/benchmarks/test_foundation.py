"""The foundation run at 1/1,000: what is foretold stands beside what it took, and a stage is not made twice."""

from __future__ import annotations

import pytest

from benchmarks import foundation
from benchmarks.shards import Cost
from scldm.errors import InputError

SMALL = {
    "vae": ("vae/tiny", "hardware/cpu", "train.steps=10", "train.validate_every=5", "train.validation_cells=60"),
    "ldm": ("ldm/tiny", "hardware/cpu", "train.steps=20", "train.validate_every=10"),
}


@pytest.mark.slow
def test_what_is_foretold_grows_with_steps_and_cells(tmp_path, monkeypatch):
    monkeypatch.setattr(foundation, "peak_flops", lambda *_: 1e11)

    def told(cells: int, steps: int) -> dict[str, dict[str, float]]:
        vae = (*SMALL["vae"], f"train.steps={steps}", f"train.validate_every={steps}")
        return foundation.foretold(
            foundation.FoundationConfig(str(tmp_path), cells, 500, 100, vae=vae, ldm=SMALL["ldm"])
        )

    few, many = told(1_000, 10), told(2_000, 20)
    for stage, key in (("shards", "s"), ("shards", "written"), ("encode", "written"), ("evaluate", "s")):
        assert many[stage][key] == pytest.approx(2 * few[stage][key], rel=0.01), (stage, key)
    assert 1.5 < many["vae"]["s"] / few["vae"]["s"] < 2  # twice the steps, as many cells validated
    assert many["generate"]["s"] == pytest.approx(2 * few["generate"]["s"], rel=0.01)
    assert all(few[stage]["memory"] > 0.01 for stage in ("vae", "ldm"))


def test_a_finished_stage_is_not_made_again(tmp_path, monkeypatch):
    asked = []

    def run(command):
        asked.append(command[4:6])
        if command[4] == "encode" and fails:
            raise InputError("no room")
        for word in command:
            if word.startswith(("out=", "run_dir=")):
                (tmp_path / word.partition("=")[2]).touch()
        return Cost(2.0, 1.0, 3 * 10**9, 0)

    monkeypatch.setattr(foundation, "run_and_watch", run)
    monkeypatch.setattr(foundation, "write_soma", lambda path, config: path.touch())
    monkeypatch.setattr(foundation, "write_wanted", lambda out, conditions: None)
    monkeypatch.setattr(foundation, "foretold", lambda config: {"vae": {"s": 4.0, "memory": 1.0}})
    config = foundation.FoundationConfig(str(tmp_path))
    fails = True
    with pytest.raises(InputError, match="no room"):
        foundation.main(config)
    fails = False
    rows = {row.name: row.value for row in foundation.main(config).rows}
    assert [command[0] for command in asked].count("encode") == 2
    assert len(asked) == len(foundation.stages(config, tmp_path)) + 1
    assert (rows["vae: CPU time"], rows["vae: CPU time, foretold"]) == (1.0, 4.0)
    assert (rows["vae: peak memory"], rows["vae: peak memory, foretold"]) == (3.0, 1.0)
    assert "encode: CPU time, foretold" not in rows
