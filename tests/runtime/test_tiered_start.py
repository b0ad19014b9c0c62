"""A tiered start: plain torch answers at once, the kernels take over between two steps, and no token changes."""

from __future__ import annotations

import logging
import shutil
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from graphserve import progress
from graphserve.artifacts import ArtifactStore
from graphserve.compiler.warmup import run_warmup
from graphserve.config import EngineConfig
from graphserve.engine.llm_engine import LLMEngine
from graphserve.errors import CacheMissError, CompileError, ConfigError
from graphserve.kernels.cpu import compiler
from graphserve.progress import PhaseEvent
from graphserve.runtime import cpp_backend, model_runner
from graphserve.runtime.load import load_model
from graphserve.runtime.model_runner import ModelRunner
from graphserve.sampling_params import SamplingParams

pytestmark = pytest.mark.skipif(compiler() is None, reason="needs a C++ compiler")

PROMPTS = ["Once upon a time", "One day, a small bird", "The"]
OPTIONS = {"dtype": "float32", "max_num_seqs": 4, "num_gpu_blocks_override": 64}


@pytest.fixture(scope="module")
def complete(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with the plan and all kernels; no test may change it."""
    root = tmp_path_factory.mktemp("complete")
    run_warmup(EngineConfig(**OPTIONS), root)
    return root


@pytest.fixture
def plans(complete: Path, tmp_path: Path) -> Path:
    """A store with the plan and no kernels."""
    shutil.copytree(complete, tmp_path / "plans", ignore=shutil.ignore_patterns("cpp"))
    return tmp_path / "plans"


@pytest.fixture
def may_build(complete: Path, plans: Path, monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Once it is set the background goes on, and has all kernels at once."""
    event = threading.Event()
    build = model_runner.build

    def held_up(*args: Any, is_stopped: Callable[[], bool], **kwargs: Any) -> object:
        while not event.wait(0.01):
            if is_stopped():
                raise CompileError("stopped")
        shutil.copytree(complete / "cpp", plans / "cpp", dirs_exist_ok=True)
        return build(*args, **kwargs)

    monkeypatch.setattr(model_runner, "build", held_up)
    return event


def nothing_in_the_foreground(*_: object) -> None:
    raise AssertionError("kernels were built in the middle of a step")


class Stepped:
    """An engine and its runner, driven a step at a time."""

    def __init__(self, store: Path, start: str) -> None:
        config = EngineConfig(compile_cache=str(store), start=start, **OPTIONS)
        loaded = load_model(config)
        self.runner: ModelRunner = loaded.model_runner
        self.engine = LLMEngine.from_loaded(config, loaded)
        self.tokens: dict[str, list[int]] = {}
        for number, prompt in enumerate(PROMPTS):
            self.engine.add_request(str(number), prompt, SamplingParams(temperature=0, max_tokens=24, ignore_eos=True))

    def step(self) -> None:
        for output in self.engine.step():
            self.tokens[output.request_id] = list(output.outputs[0].token_ids)

    def finish(self) -> dict[str, list[int]]:
        while self.engine.has_unfinished_requests():
            self.step()
        return self.tokens

    def wait(self, may_build: threading.Event) -> None:
        """Until the background has built everything."""
        background = self.runner._background
        assert background is not None
        may_build.set()
        background.wait()

    def abort_and_wake(self, level: int) -> None:
        """Sleep without requests, and wake up."""
        self.engine.abort(*map(str, range(len(PROMPTS))))
        self.engine.sleep(level)
        self.engine.wake_up()

    @property
    def kinds(self) -> set[str]:
        return {launch.kind for launch in self.runner.executed_plan.launches} - {"view"}


def test_the_kernels_take_over_in_the_middle_of_a_text_and_change_no_token(
    complete: Path,
    plans: Path,
    may_build: threading.Event,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(model_runner, "build_library", nothing_in_the_foreground)
    tiered = Stepped(plans, "tiered")
    for _ in range(7):
        tiered.step()
    assert tiered.kinds == {"reference"} and len(tiered.tokens["0"]) >= 6, "it did not answer before the build"
    tiered.wait(may_build)
    assert tiered.kinds == {"reference"}, "it changed over outside a step"
    assert "runs from now on" not in caplog.text
    tiered.step()
    assert "cpp" in tiered.kinds
    said = [record.getMessage() for record in caplog.records if record.name == model_runner.__name__]
    number = len(list(ArtifactStore(complete).artifacts("cpp")))
    assert said == [
        f"{number} of {number} libraries are built in the background; nothing stored for it",
        "generated C++ runs from now on instead of plain torch",
    ]
    found = tiered.finish()
    tiered.engine.close()
    monkeypatch.undo()

    full = Stepped(complete, "full")
    assert "cpp" in full.kinds and full.finish() == found
    full.engine.close()
    warm = Stepped(complete, "tiered")
    assert "cpp" in warm.kinds, "what is built already was not used at once"
    warm.engine.close()


def test_the_phase_says_what_is_missing_and_why(complete: Path, plans: Path, may_build: threading.Event) -> None:
    for artifact in list(ArtifactStore(complete).artifacts("cpp"))[1:]:
        shutil.copytree(artifact.folder, plans / "cpp" / artifact.folder.name)
    number = len(list(ArtifactStore(complete).artifacts("cpp")))
    ended: list[PhaseEvent] = []
    previous = progress.set_sink(lambda event: ended.append(event) if event.state == "end" else None)
    try:
        tiered = Stepped(plans, "tiered")
    finally:
        progress.set_sink(previous)
    (note,) = [event.note for event in ended if event.name == "find C++ kernels"]
    assert note == f"1 of {number} libraries are built in the background; nothing stored for it"
    tiered.engine.close()


def test_a_stored_library_of_another_compiler_is_used_at_once(
    complete: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path / "other"
    other.write_text('#!/bin/sh\n[ "$1" = --version ] && echo "g++ 99.1.0" && exit\nexit 1\n')
    other.chmod(0o755)
    monkeypatch.setenv("CXX", str(other))
    tiered = Stepped(complete, "tiered")
    assert "cpp" in tiered.kinds and tiered.runner._background is None and not tiered.runner._store.built
    tiered.abort_and_wake(level=2)  # drops the packed weights, so that kernels are looked for again
    assert "cpp" in tiered.kinds and not tiered.runner._store.built
    tiered.engine.close()


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (CompileError("the compiler is broken"), ": the compiler is broken"),
        (PermissionError(1, "Operation not permitted"), ": PermissionError: [Errno 1] Operation not permitted"),
    ],
)
def test_a_build_that_fails_leaves_plain_torch_running(
    plans: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, error: Exception, words: str
) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise error

    monkeypatch.setattr(model_runner, "build", fail)
    monkeypatch.setattr(model_runner, "build_library", nothing_in_the_foreground)
    tiered = Stepped(plans, "tiered")
    assert all(len(tokens) == 24 for tokens in tiered.finish().values())
    assert tiered.kinds == {"reference"} and words in caplog.text and caplog.text.count("plain torch goes on") == 1
    tiered.engine.close()


def test_a_build_that_was_stopped_is_not_said_to_be_done(
    plans: Path, may_build: threading.Event, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    tiered = Stepped(plans, "tiered")
    tiered.engine.close()
    assert "are built in the background" in caplog.text and "kernels built" not in caplog.text


def test_plain_weights_go_as_they_are_packed(
    plans: Path, may_build: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiered = Stepped(plans, "tiered")
    tiered.step()  # its launches hold what they read
    plain = [weakref.ref(tensor) for tensor in tiered.runner._weights.values()]
    alive: list[int] = []
    pack = cpp_backend.pack_linear_weight

    def counted(weight: torch.Tensor) -> torch.Tensor:
        alive.append(sum(tensor() is not None for tensor in plain))
        return pack(weight)

    monkeypatch.setattr(cpp_backend, "pack_linear_weight", counted)
    tiered.wait(may_build)
    tiered.step()
    assert "cpp" in tiered.kinds and len(alive) > 4
    assert alive == list(range(alive[0], alive[0] - len(alive), -1)), "packed weights stayed in memory"
    tiered.engine.close()


@pytest.mark.parametrize("level", [1, 2])
def test_a_model_that_sleeps_and_wakes_up_keeps_its_build(plans: Path, may_build: threading.Event, level: int) -> None:
    tiered = Stepped(plans, "tiered")
    background = tiered.runner._background
    tiered.abort_and_wake(level)
    assert tiered.runner._background is background and not background.is_done
    tiered.wait(may_build)
    tiered.engine.add_request("again", "The", SamplingParams(temperature=0, max_tokens=4, ignore_eos=True))
    tiered.finish()
    assert "cpp" in tiered.kinds
    tiered.engine.close()


def test_another_block_size_needs_another_build(plans: Path, may_build: threading.Event) -> None:
    config = EngineConfig(compile_cache=str(plans), start="tiered", **OPTIONS)
    runner = load_model(config).model_runner
    runner.allocate_kv_cache(8, 16)
    first = runner._background
    runner.allocate_kv_cache(8, 32)
    assert first is not None and first.is_done and runner._background is not first
    runner.close()


def test_an_engine_that_cannot_be_made_closes_its_model(
    plans: Path, may_build: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun = []

    def no_room(runner: ModelRunner, *_: int) -> None:
        begun.append(runner._background)
        raise MemoryError("no room for buffers")

    monkeypatch.setattr(ModelRunner, "reserve", no_room)
    config = EngineConfig(compile_cache=str(plans), start="tiered", **OPTIONS)
    loaded = load_model(config)
    with pytest.raises(MemoryError, match="no room for buffers"):
        LLMEngine.from_loaded(config, loaded)
    assert begun[0].is_done, "its build goes on"
    assert not loaded.model_runner.weight_memory.tensors and loaded.model_runner.kv_cache is None


def test_a_strict_store_refuses_to_build_in_the_background_too(plans: Path) -> None:
    config = EngineConfig(compile_cache=str(plans), start="tiered", strict_compile_cache=True, **OPTIONS)
    loaded = load_model(config)
    with pytest.raises(CacheMissError, match="is not in the store"):
        LLMEngine.from_loaded(config, loaded)


def test_closing_stops_the_build_and_keeps_what_is_done(plans: Path) -> None:
    config = EngineConfig(compile_cache=str(plans), start="tiered", **OPTIONS)
    runner = load_model(config).model_runner
    runner.allocate_kv_cache(8, 16)
    background = runner._background
    assert background is not None
    runner.close()
    assert background.is_done and background.result is None and "stopped" in str(background.error)
    store = ArtifactStore(plans)
    assert all(reason is None for _, reason in store.verify()) and len(list(store.artifacts("cpp"))) <= 2


def test_deterministic_results_and_a_tiered_start_exclude_each_other(plans: Path) -> None:
    with pytest.raises(ConfigError, match="start='full'"):
        load_model(EngineConfig(compile_cache=str(plans), start="tiered", deterministic=True, **OPTIONS))
