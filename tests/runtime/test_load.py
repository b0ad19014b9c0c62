"""Loading: compiled once, found again, and a damaged or foreign plan never used."""

import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from graphserve.artifacts import ArtifactStore
from graphserve.compiler.warmup import run_warmup
from graphserve.config import EngineConfig
from graphserve.demo import demo_path
from graphserve.errors import CacheMissError, ConfigError
from graphserve.models.checkpoint import Checkpoint
from graphserve.models.tokenizer import Tokenizer, load_tokenizer
from graphserve.models.weight_loading import run_program
from graphserve.runtime import find_plan, load
from graphserve.runtime.find_plan import (
    ModelPlan,
    checkpoint_layout,
    find_or_compile,
    find_or_compile_config,
    plan_factors,
    weight_factors,
)
from graphserve.runtime.load import load_model
from graphserve.runtime.model_runner import ModelRunner


@pytest.fixture(scope="module")
def store_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("store")
    run_warmup(EngineConfig(), output=root)
    return root


def test_a_stored_plan_is_used_instead_of_a_compilation(store_root: Path) -> None:
    strict = ArtifactStore(store_root, is_strict=True)
    found = find_or_compile(EngineConfig(), demo_path(), strict)
    assert found.compiled.plan.launches and found.weight_program is not None and not strict.built


def test_a_start_that_compiles_keeps_the_cache_of_the_user_below_its_limit(
    tmp_path: Path, store_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    shutil.copytree(store_root, cache)
    old = ArtifactStore(cache).put("plan", {"config": "of another model"}, {"plan.json": bytes(2 << 20)}, "an old plan")
    monkeypatch.setenv("GRAPHSERVE_CACHE", str(cache))
    monkeypatch.setenv("GRAPHSERVE_CACHE_LIMIT", "1M")
    load_model(EngineConfig()).model_runner.close()
    assert old.folder.is_dir(), "a start that compiles nothing deletes nothing"
    os.utime(old.folder / "manifest.json", (1000, 1000))
    shutil.rmtree(cache / "weights")
    load_model(EngineConfig()).model_runner.close()
    assert not old.folder.exists() and list(ArtifactStore(cache).artifacts("plan"))


def test_a_strict_store_compiles_no_plan(tmp_path: Path) -> None:
    with pytest.raises(CacheMissError, match="the plan of demo"):
        find_or_compile(EngineConfig(), demo_path(), ArtifactStore(tmp_path, is_strict=True))


def test_a_tied_pair_that_is_stored_twice_is_compared_at_each_start_and_compiled_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder, root = tmp_path / "model", tmp_path / "store"
    shutil.copytree(demo_path(), folder)
    config = json.loads((folder / "config.json").read_text())
    assert config["tie_word_embeddings"]
    tensors = load_file(folder / "model.safetensors")
    embed, head = "model.embed_tokens.weight", "lm_head.weight"
    same, other = tensors[embed].clone(), tensors[embed].flip(0)
    find_or_compile_config(EngineConfig(), folder, ArtifactStore(root))
    strict = ArtifactStore(root, is_strict=True)
    for step, value in enumerate((same, other, same, other)):
        save_file({**tensors, head: value}, folder / "model.safetensors")
        caplog.clear()
        if step == 1:
            with pytest.raises(CacheMissError, match="the plan of demo"):
                find_or_compile(EngineConfig(), folder, strict)
            find_or_compile(EngineConfig(), folder, ArtifactStore(root))
            caplog.clear()
        found = find_or_compile(EngineConfig(), folder, strict)
        assert found.weight_program is not None
        assert caplog.text.count("holds different values") == (value is other)
        values = dict(run_program(found.weight_program, folder))
        assert torch.equal(values[head], value) and torch.equal(values[embed], tensors[embed])
        assert (values[head] is values[embed]) == (value is same)
        loaded = {part.parameter for weight in found.compiled.plan.weights.values() for part in weight.parts}
        assert (head in loaded) == (value is other)


def test_of_two_starts_of_an_untied_checkpoint_one_compiles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, root = tmp_path / "model", tmp_path / "store"
    shutil.copytree(demo_path(), folder)
    tensors = load_file(folder / "model.safetensors")
    save_file({**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].flip(0)}, folder / "model.safetensors")
    others: list[Future[ModelPlan]] = []
    compile_model, stores = find_plan.compile_model, [ArtifactStore(root), ArtifactStore(root)]

    def compile_beside_another_start(*args: Any, **kwargs: Any) -> Any:
        if not others:
            others.append(pool.submit(find_or_compile, EngineConfig(), folder, stores[1]))
            with suppress(TimeoutError):
                others[0].result(timeout=1)  # it has to wait for this one
        return compile_model(*args, **kwargs)

    monkeypatch.setattr(find_plan, "compile_model", compile_beside_another_start)
    with ThreadPoolExecutor() as pool:
        made = find_or_compile(EngineConfig(), folder, stores[0])
    assert others[0].result().factors == made.factors and made.factors["untied"] == ["lm_head.weight"]
    assert stores[0].built and not stores[1].built


@pytest.mark.parametrize("option", [{"dtype": "bfloat16"}, {"max_model_len": 64}, {"quantization": "int8_w8a8"}])
def test_options_that_change_the_plan_change_its_key(option: dict[str, object]) -> None:
    folder = demo_path()
    assert plan_factors(EngineConfig.from_kwargs(**option), folder, None) != plan_factors(EngineConfig(), folder, None)
    assert plan_factors(EngineConfig(max_num_seqs=3), folder, None) == plan_factors(EngineConfig(), folder, None)
    names = [plan_factors(EngineConfig.from_kwargs(dtype=name), folder, None) for name in ("float", "float32")]
    assert names[0] == names[1]


def test_the_layout_of_the_checkpoint_keys_its_weight_program_alone(tmp_path: Path) -> None:
    factors = plan_factors(EngineConfig(), demo_path(), None)
    layouts: list[dict[str, tuple[int, ...]]] = [{"a": (2, 3)}, {"a": (3, 2)}, {"b": (2, 3)}]
    one, *others = (weight_factors(factors, checkpoint_layout(layout)) for layout in layouts)
    assert one not in others
    both = [checkpoint_layout(dict.fromkeys(names, (2,))) for names in ("ab", "ba")]
    assert both[0] == both[1], "the order of the tensors says nothing"
    assert plan_factors(EngineConfig(), demo_path(), Checkpoint.open(demo_path())) == factors


def test_a_warm_start_imports_neither_transformers_nor_dynamo(store_root: Path) -> None:
    code = (
        "import sys\n"
        "from graphserve.config import EngineConfig\n"
        "from graphserve.runtime.load import load_model\n"
        "load_model(EngineConfig()).model_runner.allocate_kv_cache(8, 16)\n"
        "print([m for m in ('transformers', 'torch._inductor', 'torch._dynamo') if m in sys.modules])"
    )
    environment = {"GRAPHSERVE_CACHE": str(store_root), "PATH": "/nowhere", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True, timeout=120
    )
    assert result.stdout.strip() == "[]"


def test_the_limits_and_end_tokens_come_with_the_model(store_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRAPHSERVE_CACHE", str(store_root))
    loaded = load_model(EngineConfig(), backend="reference")
    assert loaded.max_model_len == loaded.model_runner.plan.model["max_model_len"] > 0
    assert loaded.generation_defaults.eos_token_ids
    assert loaded.tokenizer is not None and loaded.tokenizer.encode("Once upon a time")


def test_a_broken_tokenizer_file_ends_the_start_by_name(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(demo_path(), folder)
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"tokenizer\.json cannot be read"):
        load_model(EngineConfig(model=str(folder)))


class BrokenTokenizer:
    """A model with its plan stored, whose tokenizer.json is no JSON, and the moment at which that comes out."""

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch) -> None:
        shutil.copytree(demo_path(), folder)
        (folder / "tokenizer.json").write_text("no JSON")
        self.config = EngineConfig(model=str(folder))
        self._is_due = threading.Event()
        self._futures: list[Future[Tokenizer]] = []
        self._start = load._start_tokenizer
        patch.setattr(load, "load_tokenizer", self._load_when_due)
        patch.setattr(load, "_start_tokenizer", self._start_and_note)

    def _load_when_due(self, *args: Any, **kwargs: Any) -> Tokenizer:
        assert self._is_due.wait(timeout=60)
        return load_tokenizer(*args, **kwargs)

    def _start_and_note(self, *args: Any) -> Future[Tokenizer]:
        self._futures.append(self._start(*args))
        return self._futures[0]

    def fail(self) -> None:
        """Let it fail now, and wait until it has."""
        self._is_due.set()
        wait(self._futures)

    def load_model(self) -> None:
        with pytest.raises(ConfigError, match=r"tokenizer\.json cannot be read"):
            load_model(self.config)


@pytest.fixture
def broken(store_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> BrokenTokenizer:
    monkeypatch.setenv("GRAPHSERVE_CACHE", str(store_root))
    return BrokenTokenizer(tmp_path / "model", monkeypatch)


def test_a_broken_tokenizer_is_told_before_any_weight_is_read(
    broken: BrokenTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def find_and_fail(*args: Any) -> ModelPlan:
        broken.fail()
        return find_or_compile(*args)

    monkeypatch.setattr(load, "find_or_compile", find_and_fail)
    monkeypatch.setattr(load, "run_program", lambda *args: pytest.fail("weights were read"))
    broken.load_model()


def test_once_the_tokenizer_has_failed_no_more_weights_are_read(
    broken: BrokenTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[str] = []

    def recorded(*args: Any) -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in run_program(*args):
            given.append(name)
            yield name, tensor
            broken.fail()

    monkeypatch.setattr(load, "run_program", recorded)
    broken.load_model()
    assert len(given) == 2, "the one that was being placed, and the one after it"


def test_a_tokenizer_that_fails_last_closes_the_runner(
    broken: BrokenTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed: list[ModelRunner] = []

    class Recorded(ModelRunner):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            broken.fail()

        def close(self) -> None:
            super().close()
            closed.append(self)

    monkeypatch.setattr(load, "ModelRunner", Recorded)
    broken.load_model()
    assert len(closed) == 1 and not closed[0].weights
