"""Generated C++ behind a plan: the same logits as the reference launches, one copy of each weight."""

import logging
from pathlib import Path

import pytest
import torch

from benchmarks.coverage_check import PackedRun
from graphserve.artifacts import ArtifactStore
from graphserve.compiler.build import BuildResult
from graphserve.kernels.cpu import available_levels, compiler
from graphserve.runtime import cpp_backend
from graphserve.runtime.cpp_backend import lower_to_cpp
from graphserve.runtime.kv_cache import KVCache
from graphserve.runtime.model_runner import ModelRunner
from tests.compiler.compiled import compiled_tiny
from tests.tiny_models import checkpoint_tensors, text_tokens, tiny_config, tiny_model

needs_compiler = pytest.mark.skipif(compiler() is None, reason="needs a C++ compiler")
PROMPTS = [text_tokens(length, seed=length) for length in (5, 37)]


@pytest.fixture(scope="module")
def llama() -> tuple[BuildResult, dict[str, torch.Tensor]]:
    return compiled_tiny("llama"), checkpoint_tensors(tiny_model(tiny_config("llama")))


def meta_cache(built: BuildResult, block_size: int = 16) -> KVCache:
    return KVCache(built.plan, 2, block_size, torch.device("meta"))


def logits(runner: ModelRunner) -> list[torch.Tensor]:
    return PackedRun(runner, PROMPTS).run()


def test_every_launch_of_a_llama_layer_has_a_kernel(llama: tuple[BuildResult, dict[str, torch.Tensor]]) -> None:
    lowered = lower_to_cpp(llama[0].plan, meta_cache(llama[0]))
    kinds = {launch.kind for launch in lowered.plan.launches if launch.layer == 0}
    assert kinds == {"cpp", "view"}
    assert len(lowered.kernels) > len({k.key for k in lowered.kernels.values()}) > 5, "layers share kernels"


def test_kernels_do_not_depend_on_the_size_of_the_pool(llama: tuple[BuildResult, dict[str, torch.Tensor]]) -> None:
    plan = llama[0].plan
    keys = [
        {k.key for k in lower_to_cpp(plan, KVCache(plan, blocks, 16, torch.device("meta"))).kernels.values()}
        for blocks in (2, 77)
    ]
    assert keys[0] == keys[1]


@needs_compiler
@pytest.mark.parametrize("isa", available_levels())
def test_logits_equal_the_references_at_every_isa_level(
    llama: tuple[BuildResult, dict[str, torch.Tensor]], isa: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    built, parameters = llama
    monkeypatch.setattr(cpp_backend, "isa_level", lambda: isa)
    expected = logits(ModelRunner(built.plan, parameters, built.constants, backend="reference"))
    found = logits(ModelRunner(built.plan, parameters, built.constants, backend="cpp"))
    for a, b in zip(expected, found, strict=True):
        assert float((a - b).abs().max() / a.abs().max()) < 1e-5


@needs_compiler
def test_packed_weights_leave_no_second_copy(llama: tuple[BuildResult, dict[str, torch.Tensor]]) -> None:
    built, parameters = llama
    runner = ModelRunner(built.plan, parameters, built.constants, backend="cpp")
    runner.allocate_kv_cache(4, 16)
    plain = {name for name, w in runner._weights.items() if w.device.type == "cpu"}
    assert plain and not any("proj" in name for name in plain)


@needs_compiler
def test_another_block_size_after_the_first_gives_the_same_logits(
    llama: tuple[BuildResult, dict[str, torch.Tensor]],
) -> None:
    built, parameters = llama
    runner = ModelRunner(built.plan, parameters, built.constants, backend="cpp")
    runner.allocate_kv_cache(64, 32)
    found = logits(runner)  # allocates again, with blocks of 16
    expected = logits(ModelRunner(built.plan, parameters, built.constants, backend="reference"))
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-4) for a, b in zip(expected, found, strict=True))


def test_without_a_compiler_the_references_run_and_one_line_says_so(
    llama: tuple[BuildResult, dict[str, torch.Tensor]],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    tmp_path: Path,
) -> None:
    built, parameters = llama
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    runner = ModelRunner(built.plan, parameters, built.constants, store=ArtifactStore(tmp_path))
    with caplog.at_level(logging.WARNING):
        runner.allocate_kv_cache(4, 16)
    assert {launch.kind for launch in runner.executed_plan.launches} == {"reference", "view"}
    assert len(logits(runner)) > 0
    assert [r.message for r in caplog.records if "no C++ compiler" in r.message]


def test_close_gives_weights_and_cache_back(llama: tuple[BuildResult, dict[str, torch.Tensor]]) -> None:
    built, parameters = llama
    runner = ModelRunner(built.plan, parameters, built.constants, backend="reference")
    logits(runner)
    runner.close()
    assert runner.kv_cache is None and not runner._weights and runner._runner.arena_bytes == 0
