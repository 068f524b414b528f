"""A comparison's runs: chosen rates, several seeds, processes that end badly, going on after a kill."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from filelock import FileLock

from inlay import InlayError
from inlay_train.compare.engine import Comparison, compare
from inlay_train.compare.processes import why
from inlay_train.compare.store import Job, Outcome, Store

HERE = Path(__file__).parent


@pytest.fixture(autouse=True)
def runners(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(HERE))


def small(tmp_path: Path, *stacks: str, seeds: int = 1, rates: tuple[float, ...] = (1.0,)) -> Comparison:
    return Comparison(
        {stack: stack for stack in stacks}, "runners:small", {"rows": 7}, seeds, rates,
        {"log": str(tmp_path / "ran")},
    )  # fmt: skip


def ran(tmp_path: Path) -> list[str]:
    return [line.rsplit(" ", 1)[0] for line in (tmp_path / "ran").read_text().splitlines()]


def test_rates_are_chosen_first_then_every_seed_runs_once(tmp_path: Path) -> None:
    phases: list[tuple[str, int]] = []
    wanted = small(tmp_path, "bb", seeds=2, rates=(0.5, 1.0))
    result = compare(
        wanted, tmp_path / "out", processes=2, phase=lambda name, runs: phases.append((name, runs))
    )
    assert phases == [("choosing learning rates", 2), ("comparing", 2)]
    assert sorted(ran(tmp_path)[:2]) == ["bb 0 0.5", "bb 0 1"]
    assert sorted(ran(tmp_path)[2:]) == ["bb 0 1", "bb 1 1"]
    row = result.rows[0]
    assert (row.stack, row.rate, row.values, row.parameters, row.share) == ("bb", 1.0, [0.9, 0.91], 20, 0.02)
    assert row.mean == pytest.approx(0.905)
    assert row.spread == pytest.approx(0.00707, abs=1e-5)
    assert row.tried == {"0.5": pytest.approx(0.85), "1": 0.9}
    assert row.losses == [(1.0, 1.0), (2.0, 0.5)]


def test_runs_that_fail_fail_alone_and_are_tried_again(tmp_path: Path) -> None:
    wanted = small(tmp_path, "a", "killed", "refused", "broken")
    result = compare(wanted, tmp_path / "out", processes=2)
    assert [row.stack for row in result.rows] == ["a"]
    assert result.failed == {
        "killed": "ended by SIGKILL (out of memory?)",
        "refused": "this cannot be trained",
        "broken": "ValueError: a mistake in the program",
    }
    compare(small(tmp_path, "a", "refused"), tmp_path / "out")
    assert sorted(line.split()[0] for line in ran(tmp_path)) == [
        "a",
        "broken",
        "killed",
        "refused",
        "refused",
    ]


def test_a_comparison_without_any_result_says_where_to_look(tmp_path: Path) -> None:
    with pytest.raises(
        InlayError, match=r"no run .* came to an end\n.*refused: this cannot be trained\n.*logs"
    ):
        compare(small(tmp_path, "refused"), tmp_path / "out")


def test_a_folder_in_use_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with (
        FileLock(tmp_path / "out" / "compare.lock"),
        pytest.raises(InlayError, match=r"another run is writing .*\n.*compare\.lock is held"),
    ):
        compare(small(tmp_path, "a"), tmp_path / "out")


def test_a_killed_comparison_goes_on_and_leaves_no_process(tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from inlay_train.compare.engine import *;"
        f"compare(Comparison({{'a': 'a', 'slow': 'slow'}}, 'runners:small', {{'rows': 7}}, 1, (1.0,),"
        f"{{'log': {str(tmp_path / 'ran')!r}}}), Path({str(tmp_path / 'out')!r}))"
    )
    process = subprocess.Popen([sys.executable, "-c", program])
    try:
        wait_for(lambda: (tmp_path / "ran").exists() and len(ran(tmp_path)) == 2)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    worker = int((tmp_path / "ran").read_text().split()[-1])
    wait_for(lambda: not alive(worker))
    compare(small(tmp_path, "a", "bb"), tmp_path / "out")
    assert [line.split()[0] for line in ran(tmp_path)] == ["a", "slow", "bb"]


def wait_for(condition: object, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < end
        time.sleep(0.1)


def alive(pid: int) -> bool:
    """Whether a process still runs; one that ended and waits for its parent to notice does not."""
    try:
        os.kill(pid, 0)
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (OSError, FileNotFoundError):
        return False


def test_a_run_is_known_by_all_that_matters_and_by_nothing_else() -> None:
    job = Job("lora", 0, 1.0, False, "runners:small", {"data": "digest"}, {"data": "here"})
    assert replace(job, paths={"data": "there"}).digest == job.digest
    others = [
        replace(job, stack="ia3"), replace(job, seed=1), replace(job, rate=2.0), replace(job, choosing=True),
        replace(job, runner="other:small"), replace(job, settings={"data": "another"}),
    ]  # fmt: skip
    assert len({other.digest for other in [job, *others]}) == 7


def test_a_result_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    store, job = Store(tmp_path), Job("lora", 0, 1.0, False, "runners:small", {})
    assert store.get(job) is None
    for damage in ("{", "[]", json.dumps({"outcome": {"metric": "accuracy"}})):
        store.path(job).write_text(damage)
        with pytest.raises(
            InlayError, match=rf"cannot be read\n.*{job.digest}\.json: .*\n.*delete that file"
        ):
            store.get(job)


def test_results_are_kept_whole(tmp_path: Path) -> None:
    store, job = Store(tmp_path), Job("lora", 0, 1.0, False, "runners:small", {})
    outcome = Outcome("accuracy", 0.5, True, 1, 2, 3, 0.1, 0.2, 4, "yes", 5, [(1.0, 2.0)])
    store.put(job, outcome)
    assert store.get(job) == replace(outcome, losses=[[1.0, 2.0]])  # type: ignore[list-item]


def test_why_a_run_ended(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("")
    assert why(3, log) == "ended with status 3, saying nothing"
    assert why(-signal.SIGSEGV, log) == "ended by SIGSEGV"
