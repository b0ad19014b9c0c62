"""Loading: compiled once, found again, and a damaged or foreign plan never used."""

import subprocess
import sys
from pathlib import Path

import pytest

from graphserve.compiler.warmup import run_warmup
from graphserve.config import EngineConfig
from graphserve.demo import demo_path
from graphserve.plan.store import PlanStore
from graphserve.runtime import load
from graphserve.runtime.load import find_or_compile, key_factors, load_model


@pytest.fixture(scope="module")
def store_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("store")
    run_warmup(EngineConfig(), output=root)
    return root


def test_warmup_stores_everything_and_check_agrees(store_root: Path) -> None:
    report = run_warmup(EngineConfig(), output=store_root, check=True)
    assert report.is_complete and "plan of" in str(report)


def test_check_names_what_is_missing_and_compiles_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load, "compile_model", lambda *a: pytest.fail("compiled although --check was given"))
    report = run_warmup(EngineConfig(), output=tmp_path, check=True)
    assert not report.is_complete and "plan for demo" in report.missing[0]


def test_a_stored_plan_is_used_instead_of_a_compilation(store_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load, "compile_model", lambda *a: pytest.fail("compiled although the plan is stored"))
    stored = find_or_compile(EngineConfig(), demo_path(), PlanStore(store_root))
    assert stored.plan.launches


@pytest.mark.parametrize("option", [{"dtype": "float32"}, {"max_model_len": 64}])
def test_options_that_change_the_plan_change_its_key(option: dict[str, object]) -> None:
    folder = demo_path()
    assert key_factors(EngineConfig.from_kwargs(**option), folder) != key_factors(EngineConfig(), folder)
    assert key_factors(EngineConfig(max_num_seqs=3), folder) == key_factors(EngineConfig(), folder)


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
