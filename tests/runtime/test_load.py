"""Loading: compiled once, found again, and a damaged or foreign plan never used."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from graphserve.artifacts import ArtifactStore
from graphserve.compiler.warmup import run_warmup
from graphserve.config import EngineConfig
from graphserve.demo import demo_path
from graphserve.errors import CacheMissError, ConfigError
from graphserve.models.checkpoint import Checkpoint
from graphserve.runtime.find_plan import find_or_compile, plan_factors, weight_factors
from graphserve.runtime.load import load_model


@pytest.fixture(scope="module")
def store_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("store")
    run_warmup(EngineConfig(), output=root)
    return root


def test_a_stored_plan_is_used_instead_of_a_compilation(store_root: Path) -> None:
    strict = ArtifactStore(store_root, is_strict=True)
    found = find_or_compile(EngineConfig(), demo_path(), strict)
    assert found.compiled.plan.launches and found.weight_program is not None and not strict.built


def test_a_strict_store_compiles_no_plan(tmp_path: Path) -> None:
    with pytest.raises(CacheMissError, match="the plan of demo"):
        find_or_compile(EngineConfig(), demo_path(), ArtifactStore(tmp_path, is_strict=True))


@pytest.mark.parametrize("option", [{"dtype": "bfloat16"}, {"max_model_len": 64}, {"quantization": "int8_w8a8"}])
def test_options_that_change_the_plan_change_its_key(option: dict[str, object]) -> None:
    folder = demo_path()
    assert plan_factors(EngineConfig.from_kwargs(**option), folder, None) != plan_factors(EngineConfig(), folder, None)
    assert plan_factors(EngineConfig(max_num_seqs=3), folder, None) == plan_factors(EngineConfig(), folder, None)
    names = [plan_factors(EngineConfig.from_kwargs(dtype=name), folder, None) for name in ("float", "float32")]
    assert names[0] == names[1]


def test_the_layout_of_the_checkpoint_keys_its_weight_program_alone(tmp_path: Path) -> None:
    factors = plan_factors(EngineConfig(), demo_path(), None)
    one = weight_factors(factors, {"a": (2, 3)})
    assert one != weight_factors(factors, {"a": (3, 2)}) and one != weight_factors(factors, {"b": (2, 3)})
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
