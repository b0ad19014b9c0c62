"""Plans and weight programs: what was saved is loaded, and nothing else."""

import tempfile
from pathlib import Path

import pytest
import torch

from graphserve.artifacts import ArtifactStore
from graphserve.artifacts.cache_dir import remove_own_folder
from graphserve.models.weight_program import Load, ParameterRule, WeightProgram
from graphserve.plan.schema import CacheGroup, CacheSpec, Launch, Plan, TensorSpec, WeightPart, WeightSpec
from graphserve.plan.store import (
    CompiledPlan,
    load_plan,
    load_weight_programs,
    save_plan,
    save_weight_programs,
)

FACTORS = {"config": "abc", "torch": "2.13.0"}


@pytest.fixture
def store(tmp_path: Path) -> ArtifactStore:
    return ArtifactStore(tmp_path)


@pytest.fixture
def compiled() -> CompiledPlan:
    plan = Plan(
        {"vocab_size": 4, "max_model_len": 8},
        [
            Launch(
                "gs.linear.default", ({"v": "x"}, {"v": "w"}, None, {"s": "4*T"}), {"a": {"f": "-inf"}}, ("y",), layer=1
            )
        ],
        [],
        {"y": TensorSpec((1, "T", 4), "float32")},
        {"w": WeightSpec(TensorSpec((4, 4), "float32"), "parameters", (WeightPart("p", 4),))},
        [CacheSpec(2, 8, 8, "bfloat16", window=4)],
        [CacheGroup((0,), window=4)],
        ("y",),
        [],
    )
    return CompiledPlan(plan, {"inv_freq": torch.arange(4.0)})


def test_what_was_saved_is_loaded(store: ArtifactStore, compiled: CompiledPlan) -> None:
    assert load_plan(store, FACTORS) is None
    assert save_plan(store, FACTORS, compiled) is not None
    found = load_plan(store, FACTORS)
    assert found is not None and found.plan == compiled.plan
    assert torch.equal(found.constants["inv_freq"], compiled.constants["inv_freq"])
    assert load_plan(store, {**FACTORS, "torch": "other"}) is None


def test_a_weight_program_survives(store: ArtifactStore) -> None:
    rule, twice = (ParameterRule(Load(name), (4, 4), "float32") for name in ("t", "u"))
    program = WeightProgram({"p": rule}, {"q": "p", "r": "p"}, {"r": twice})
    assert program.untied(["r"]) == WeightProgram({"p": rule, "r": twice}, {"q": "p"})
    assert load_weight_programs(store, FACTORS) is None
    save_weight_programs(store, FACTORS, {"layout": program})
    assert load_weight_programs(store, FACTORS) == {"layout": program}


def test_a_store_that_cannot_be_written_costs_only_a_warning(
    tmp_path: Path, compiled: CompiledPlan, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "plan").write_text("a file where the folder should be")
    store = ArtifactStore(tmp_path)
    assert save_plan(store, FACTORS, compiled) is not None and "kept for this run only" in caplog.text
    assert load_plan(store, FACTORS) is not None, "what could not be stored serves this run"
    assert load_plan(ArtifactStore(tmp_path), FACTORS) is None
    remove_own_folder()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "nowhere"))
    assert save_plan(ArtifactStore(tmp_path), FACTORS, compiled) is None and "could not be stored" in caplog.text
