"""Who is named where nothing goes on. What two real ranks say is in test_two_ranks.py, and
in tests/launch/test_faults.py."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest
import torch

from scldm.errors import LOST
from scldm.parallel.dist import World
from scldm.parallel.watch import ANSWER_S, Watch


@pytest.mark.parametrize("left, named", [(set(), "rank 0 (a) hangs"), ({0}, "rank 1 (b) hangs, after rank 0 ended")])
def test_a_first_rank_that_left_in_order_does_not_hang(
    monkeypatch: pytest.MonkeyPatch, left: set[int], named: str
) -> None:
    watch, ends = Watch(World(1, 2, torch.device("cpu")), hang_s=1.0), list[tuple[str, int]]()
    monkeypatch.setattr(watch, "_end", lambda reason, code: ends.append((reason, code)))
    monkeypatch.setattr(watch, "_dump", lambda: None)
    watch._names, watch._left = ["a", "b"], left
    watch.doing, watch.marked_at = "saves step 5", time.monotonic() - 4 * ANSWER_S - 2
    watch._look_for_a_hang()
    ((reason, code),) = ends
    assert reason.startswith(named)
    assert code == LOST


@pytest.mark.parametrize(
    "error, code", [(torch.OutOfMemoryError("CUDA out of memory"), 1), (RuntimeError("gone"), LOST)]
)
def test_memory_that_a_collective_lacks_is_this_rank_s_own_failure(
    monkeypatch: pytest.MonkeyPatch, error: Exception, code: int
) -> None:
    watch, told, ends = Watch(World(0, 2, torch.device("cpu"))), list[dict[str, Any]](), list[int]()
    monkeypatch.setattr(watch, "_tell", lambda **message: told.append(message))
    monkeypatch.setattr(watch, "_end", lambda reason, code: ends.append(code))
    monkeypatch.setattr("scldm.parallel.watch.ANSWER_S", 0.0)
    monkeypatch.setattr("scldm.parallel.watch.faulthandler.dump_traceback_later", lambda *_, **__: None)
    gather = compile("raise error", torch.distributed.__file__, "exec")
    with pytest.raises(type(error)) as raised:
        exec(gather, {"error": error})
    watch._fail(error, raised.tb)
    assert told[0]["code"] == code
    assert ends == ([LOST] if code == LOST else [])


def test_a_process_that_is_being_ended_is_not_left_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is told at the end takes seconds, in which the main thread may fail: the exit code is the watch's."""
    watch, order, go = Watch(World(0, 1, torch.device("cpu")), hang_s=1.0), list[Any](), threading.Event()

    def tell(reason: str, code: int) -> None:
        go.wait(5)
        order.append("told")
        raise ValueError("whatever it is")

    monkeypatch.setattr("scldm.parallel.watch.os._exit", order.append)
    monkeypatch.setattr("scldm.parallel.watch.TICK_S", 0.01)
    watch.on_end = tell
    watch._thread = threading.Thread(target=watch._end, args=("a hang", LOST))
    watch._thread.start()
    while not watch._ending:
        time.sleep(0.01)
    threading.Timer(0.2, go.set).start()
    watch.__exit__(RuntimeError, RuntimeError("of the main thread"), None)
    assert order == ["told", LOST]
    watch._end("again", 1)
    assert order == ["told", LOST]
