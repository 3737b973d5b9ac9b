"""A run's state comes back from JSON as it was, whatever JSON has no word for."""

from __future__ import annotations

import json
import math

from scldm.train.run_state import RunState, comparable


def test_a_state_comes_back_from_json() -> None:
    state = RunState(
        100,
        3,
        early_end=60,
        step=50,
        cells_seen=900,
        skipped=1,
        unvalidated=True,
        stale=3,
        best=2.5,
        validation={"a": 1.0},
    )
    assert RunState.of_json(json.loads(json.dumps(state.to_json(), allow_nan=False)), 100, 3) == state


def test_what_is_not_finite_comes_back() -> None:
    state = RunState(100, 0, validation={"nll": math.nan, "kl": 1.0})
    found = RunState.of_json(json.loads(json.dumps(state.to_json(), allow_nan=False)), 100, 0)
    assert found.best == math.inf
    assert math.isnan(found.validation["nll"])
    assert found.validation["kl"] == 1.0


def test_no_checkpoint_is_the_best_while_steps_are_skipped() -> None:
    state = RunState(100, 0, skipped=1, best=5.0, stale=2)
    assert not state.validated({"nll": 4.0, "cells": 9}, "nll")
    assert (state.best, state.stale) == (5.0, 0)
    state.skipped = 0
    assert state.validated({"nll": 4.0, "cells": 9}, "nll")
    assert state.best == 4.0


def test_a_validation_of_other_cells_is_compared_with_none_before_it() -> None:
    state = RunState(100, 3, best=4.0, stale=2, validation={"nll": 5.0, "cells": 20_000.0})
    assert not state.validated({"nll": 5.0, "cells": 20_000.0}, "nll")
    state = RunState.of_json(state.to_json(), 100, 3)
    assert state.stale == 3
    assert state.validated({"nll": 9.0, "cells": 500.0}, "nll")
    assert (state.best, state.stale) == (9.0, 0)
    unknown = RunState(100, 3, best=4.0, stale=2, validation={"nll": 4.0})  # of a run that did not note them
    assert unknown.validated({"nll": 4.4, "cells": 20_000.0}, "nll")


def test_validations_of_as_many_cells_as_the_last_are_comparable() -> None:
    rows = [{"nll": 1.0}, {"nll": 2.0, "cells": 9}, {"nll": 4.0, "cells": 9}]
    assert comparable(rows) == rows[1:]
    assert comparable(rows[:1]) == rows[:1]
    assert comparable([]) == []


def test_another_number_of_steps_takes_an_early_end_back() -> None:
    found = RunState(100, 3, early_end=60, step=60, stale=4, best=2.5).to_json()
    assert RunState.of_json(found, 100, 3).is_over
    longer = RunState.of_json(found, 200, 3)
    assert (longer.is_over, longer.end, longer.stale, longer.best) == (False, 200, 0, 2.5)
