"""Stored plans: found only under the same factors, never used damaged."""

import json
from pathlib import Path

import pytest
import torch

from graphserve.models.weight_program import Load, ParameterRule, WeightProgram
from graphserve.plan.schema import CacheGroup, CacheSpec, Launch, Plan, TensorSpec, WeightPart, WeightSpec
from graphserve.plan.store import PlanStore, StoredPlan, plan_key

FACTORS = {"config": "abc", "torch": "2.13.0"}


@pytest.fixture
def stored() -> StoredPlan:
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
    program = WeightProgram({"p": ParameterRule(Load("t"), (4, 4), "float32")}, {"q": "p"})
    return StoredPlan(plan, program, {"inv_freq": torch.arange(4.0)})


def test_what_was_saved_is_loaded(tmp_path: Path, stored: StoredPlan) -> None:
    store = PlanStore(tmp_path)
    assert store.load(FACTORS) is None
    store.save(FACTORS, stored)
    found = store.load(FACTORS)
    assert found is not None
    assert found.plan == stored.plan and found.weight_program == stored.weight_program
    assert torch.equal(found.constants["inv_freq"], stored.constants["inv_freq"])


@pytest.mark.parametrize("factor", sorted(FACTORS))
def test_each_factor_changes_the_key(tmp_path: Path, stored: StoredPlan, factor: str) -> None:
    store = PlanStore(tmp_path)
    store.save(FACTORS, stored)
    assert store.load({**FACTORS, factor: "other"}) is None
    assert plan_key(FACTORS) == plan_key(dict(reversed(FACTORS.items())))


@pytest.mark.parametrize("name", ["plan.json", "weights.json", "constants.safetensors"])
@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_a_damaged_entry_is_not_used_and_can_be_replaced(
    tmp_path: Path, stored: StoredPlan, name: str, damage: str
) -> None:
    store = PlanStore(tmp_path)
    folder = store.save(FACTORS, stored)
    assert folder is not None
    data = bytearray((folder / name).read_bytes())
    if damage == "flip":
        data[len(data) // 2] ^= 1
        (folder / name).write_bytes(data)
    elif damage == "truncate":
        (folder / name).write_bytes(data[:-3])
    else:
        (folder / name).unlink()
    assert store.load(FACTORS) is None
    store.save(FACTORS, stored)
    assert store.load(FACTORS) is not None


def test_no_file_of_an_entry_names_its_place(tmp_path: Path, stored: StoredPlan) -> None:
    folder = PlanStore(tmp_path).save(FACTORS, stored)
    assert folder is not None
    assert all(str(tmp_path).encode() not in path.read_bytes() for path in folder.iterdir())
    assert json.loads((folder / "manifest.json").read_text())["factors"] == FACTORS


def test_a_store_that_cannot_be_written_costs_only_a_warning(
    tmp_path: Path, stored: StoredPlan, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "plans").write_text("a file where the folder should be")
    assert PlanStore(tmp_path).save(FACTORS, stored) is None
    assert "could not be stored" in caplog.text
