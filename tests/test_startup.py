"""The start-up report: every second is counted once, and what no phase covers is told."""

from __future__ import annotations

import gc
import json
import os
import platform
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from graphserve import startup
from graphserve.progress import PhaseEvent
from graphserve.startup import StartupClock, import_turn, process_age_s, without_collector


class Time:
    """A clock that is set by hand."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock_time(monkeypatch: pytest.MonkeyPatch) -> Time:
    hand_set = Time()
    monkeypatch.setattr(startup, "time", hand_set)
    monkeypatch.setattr(startup, "process_age_s", lambda: 1.0)
    return hand_set


def run_phase(clock: StartupClock, clock_time: Time, name: str, seconds: float, *inner: tuple[str, float]) -> None:
    clock(PhaseEvent(name, "begin"))
    for inner_name, inner_seconds in inner:
        run_phase(clock, clock_time, inner_name, inner_seconds)
    clock_time.now += seconds
    clock(PhaseEvent(name, "end", seconds=seconds + sum(s for _, s in inner)))


def test_phases_and_the_time_between_them_add_up(clock_time: Time) -> None:
    clock = StartupClock()
    run_phase(clock, clock_time, "load", 2.0)
    clock_time.now += 0.5  # in no phase
    run_phase(clock, clock_time, "compile", 3.0)
    asked_at = clock_time.now
    clock_time.now += 0.25
    clock.first_token(asked_at)
    run_phase(clock, clock_time, "after it", 9.0)
    report = clock.report()
    assert [phase["name"] for phase in report["phases"]] == ["start Python", "load", "compile", "first step"]
    assert report["seconds_to_first_token"] == pytest.approx(6.75)
    assert report["unexplained_seconds"] == pytest.approx(0.5)


def test_a_phase_around_others_explains_nothing(clock_time: Time) -> None:
    clock = StartupClock()
    run_phase(clock, clock_time, "everything", 4.0, ("load", 1.0), ("compile", 2.0))
    report = clock.report()
    assert "everything" not in [phase["name"] for phase in report["phases"]]
    assert report["unexplained_seconds"] == pytest.approx(4.0)


def test_every_event_is_handed_on(clock_time: Time) -> None:
    seen: list[PhaseEvent] = []
    run_phase(StartupClock(seen.append), clock_time, "load", 1.0)
    assert [event.state for event in seen] == ["begin", "end"]


def test_nothing_is_drawn_over_the_answer(clock_time: Time) -> None:
    seen: list[PhaseEvent] = []
    clock = StartupClock(seen.append)
    clock.first_token(clock_time.now)
    run_phase(clock, clock_time, "pack weights", 1.0)
    assert not seen


def test_the_age_of_a_process_begins_with_its_birth() -> None:
    code = "import time; time.sleep(0.3); from graphserve.startup import process_age_s; print(process_age_s())"
    begin = time.monotonic()
    age = float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
    assert 0.25 < age < time.monotonic() - begin + 0.1
    assert process_age_s() > 0


def test_the_collector_rests_while_a_model_is_loaded_and_comes_back() -> None:
    num_frozen = gc.get_freeze_count()
    try:
        with without_collector():
            assert not gc.isenabled()
        assert gc.isenabled() and gc.get_freeze_count() > num_frozen
        with pytest.raises(ValueError), without_collector():
            raise ValueError
        assert gc.isenabled()
    finally:
        gc.unfreeze()


def test_generate_writes_the_report_of_its_start(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    command = [sys.executable, "-m", "graphserve", "generate", "--prompt", "a", "--max-tokens", "1"]
    result = subprocess.run([*command, "--startup-report", str(path)], capture_output=True, text=True, env=os.environ)
    assert result.returncode == 0, result.stderr
    report = json.loads(path.read_text())
    names = [phase["name"] for phase in report["phases"]]
    assert names[0] == "start Python" and {"import torch", "load weights", "first step"} <= set(names)
    assert 0 <= report["unexplained_seconds"] < report["seconds_to_first_token"]
    assert "to the first token" in result.stderr


def test_the_first_token_of_several_prompts_is_reported_too(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    command = [sys.executable, "-m", "graphserve", "generate", "-p", "a", "-p", "b", "--max-tokens", "200"]
    subprocess.run([*command, "--ignore-eos", "--startup-report", str(path)], capture_output=True, check=True)
    report = json.loads(path.read_text())
    assert report["phases"][-1]["name"] == "first step"


def test_the_engine_is_imported_without_torch_so_that_a_start_can_tell_them_apart() -> None:
    code = "import sys, graphserve.engine.llm_engine; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.skipif(platform.machine() != "x86_64", reason="elsewhere torch's own BLAS may be numpy's")
@pytest.mark.parametrize("given", [None, "3"])
def test_a_command_makes_no_threads_for_the_blas_of_numpy_unless_it_is_told_to(given: str | None) -> None:
    code = (
        "import sys; from graphserve.cli.main import run_process; sys.argv[1:] = ['--version']\n"
        "try: run_process()\nexcept SystemExit: import os; print(os.environ['OPENBLAS_NUM_THREADS'])"
    )
    environment = {k: v for k, v in os.environ.items() if k != "OPENBLAS_NUM_THREADS"}
    environment |= {} if given is None else {"OPENBLAS_NUM_THREADS": given}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == (given or "1")


def test_processes_of_one_processor_import_one_after_the_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(startup, "available_processors", lambda: 1)
    monkeypatch.setattr(startup, "cache_dir", lambda: tmp_path)
    entered = threading.Event()

    def other() -> None:
        with import_turn():
            entered.set()

    thread = threading.Thread(target=other)
    with import_turn():
        thread.start()
        assert not entered.wait(0.3)
    assert entered.wait(10)
    thread.join()
    # Nobody waits for a stuck one for long.
    monkeypatch.setattr(startup, "_IMPORT_TIMEOUT_S", 0.1)
    with import_turn(), import_turn():
        pass
    assert "an import of torch" in caplog.text
