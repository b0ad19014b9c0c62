"""A tiered start: plain torch answers at once, the kernels take over between two steps, and no token changes."""

from __future__ import annotations

import shutil
import threading
from pathlib import Path

import pytest

from graphserve.artifacts import ArtifactStore
from graphserve.compiler.warmup import run_warmup
from graphserve.config import EngineConfig
from graphserve.engine.llm_engine import LLMEngine
from graphserve.errors import CacheMissError, CompileError, ConfigError
from graphserve.kernels.cpu import compiler
from graphserve.runtime import model_runner
from graphserve.runtime.load import load_model
from graphserve.runtime.model_runner import ModelRunner
from graphserve.sampling_params import SamplingParams

pytestmark = pytest.mark.skipif(compiler() is None, reason="needs a C++ compiler")

PROMPTS = ["Once upon a time", "One day, a small bird", "The"]
OPTIONS = {"dtype": "float32", "max_num_seqs": 4, "num_gpu_blocks_override": 64}


@pytest.fixture(scope="module")
def plans(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with the plan and no kernels."""
    root = tmp_path_factory.mktemp("plans")
    run_warmup(EngineConfig(**OPTIONS), root)
    for artifact in ArtifactStore(root).artifacts("cpp"):
        for path in artifact.folder.iterdir():
            path.unlink()
        artifact.folder.rmdir()
    return root


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

    @property
    def kinds(self) -> set[str]:
        return {launch.kind for launch in self.runner.executed_plan.launches} - {"view"}


def test_the_kernels_take_over_in_the_middle_of_a_text_and_change_no_token(
    plans: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    may_build = threading.Event()
    compile_missing = model_runner.compile_missing

    def held_up(*args: object, **kwargs: object) -> None:
        assert may_build.wait(60)
        compile_missing(*args, **kwargs)

    monkeypatch.setattr(model_runner, "compile_missing", held_up)
    tiered = Stepped(plans, "tiered")
    for _ in range(7):
        tiered.step()
    assert tiered.kinds == {"reference"} and len(tiered.tokens["0"]) >= 6, "it did not answer before the build"
    background = tiered.runner._background
    assert background is not None
    may_build.set()
    background.wait()
    assert tiered.kinds == {"reference"}, "it changed over outside a step"
    tiered.step()
    assert "cpp" in tiered.kinds
    found = tiered.finish()
    tiered.engine.close()

    full = Stepped(plans, "full")
    assert "cpp" in full.kinds and full.finish() == found
    full.engine.close()
    warm = Stepped(plans, "tiered")
    assert "cpp" in warm.kinds, "what is built already was not used at once"
    warm.engine.close()


def test_a_build_that_fails_leaves_plain_torch_running(
    plans: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise CompileError("the compiler is broken")

    monkeypatch.setattr(model_runner, "compile_missing", fail)
    monkeypatch.setattr("graphserve.runtime.model_runner.missing_libraries", lambda *_: ["all"])
    tiered = Stepped(plans, "tiered")
    assert all(len(tokens) == 24 for tokens in tiered.finish().values())
    assert tiered.kinds == {"reference"} and "the compiler is broken" in caplog.text
    tiered.engine.close()


def test_a_strict_store_refuses_to_build_in_the_background_too(plans: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    shutil.copytree(plans, store, ignore=shutil.ignore_patterns("cpp"))
    config = EngineConfig(compile_cache=str(store), start="tiered", strict_compile_cache=True, **OPTIONS)
    loaded = load_model(config)
    with pytest.raises(CacheMissError, match="is not in the store"):
        LLMEngine.from_loaded(config, loaded)
    loaded.model_runner.close()


def test_closing_stops_the_build_and_keeps_what_is_done(plans: Path, tmp_path: Path) -> None:
    store = ArtifactStore(tmp_path)
    config = EngineConfig(compile_cache=str(plans), **OPTIONS)
    runner = load_model(config).model_runner
    runner._store, runner._is_tiered = store, True
    runner.allocate_kv_cache(8, 16)
    background = runner._background
    assert background is not None
    runner.close()
    assert background.is_done and background.error is None
    assert all(reason is None for _, reason in store.verify())


def test_deterministic_results_and_a_tiered_start_exclude_each_other(plans: Path) -> None:
    with pytest.raises(ConfigError, match="start='full'"):
        load_model(EngineConfig(compile_cache=str(plans), start="tiered", deterministic=True, **OPTIONS))
