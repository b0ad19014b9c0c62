"""Warming up: from a config alone, for targets that are not here, once, and shared between depths."""

from __future__ import annotations

import importlib
import json
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from graphserve.artifacts import ArtifactStore
from graphserve.cli.main import main
from graphserve.compiler.warmup import run_warmup
from graphserve.compiler.warmup_report import WarmupReport
from graphserve.config import EngineConfig
from graphserve.demo import demo_path
from graphserve.engine import measure_choices
from graphserve.engine.model_executor import ModelExecutor
from graphserve.errors import ConfigError
from graphserve.kernels.cpu import ISA_LEVELS, compiler
from graphserve.llm import LLM
from graphserve.runtime.choices import StepChoice
from graphserve.runtime.find_plan import find_or_compile, folder_factors
from graphserve.sampling_params import SamplingParams

pytestmark = pytest.mark.skipif(compiler() is None, reason="needs a C++ compiler")


def config_only(folder: Path, **changes: object) -> Path:
    """The demo model's config, changed, without weights."""
    folder.mkdir(parents=True)
    config = json.loads((demo_path() / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    return folder


def states(report: WarmupReport) -> dict[str, Counter[str]]:
    groups: dict[str, Counter[str]] = {}
    for row in report.rows:
        groups.setdefault(row.group.partition(":")[0], Counter())[row.state] += 1
    return groups


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Warmed up from the config alone, for this processor."""
    root = tmp_path_factory.mktemp("warm")
    report = run_warmup(EngineConfig(model=str(config_only(root / "model"))), root / "store")
    assert report.is_complete and all(set(count) == {"built"} for count in states(report).values())
    return root / "store"


def test_a_second_warmup_builds_nothing_and_check_agrees(store: Path) -> None:
    for check in (False, True):
        report = run_warmup(EngineConfig(), store, check=check)
        assert report.is_complete and all(set(count) == {"stored"} for count in states(report).values())
        assert "complete: a start compiles nothing" in str(report)


def copied(store: Path, to: Path, without: tuple[str, ...]) -> Path:
    """The store, less the artifacts of some kinds."""
    shutil.copytree(store, to)
    for kind in without:
        shutil.rmtree(to / kind)
    return to


def test_check_of_a_config_names_a_weight_program_that_is_gone_and_warmup_makes_it_again(
    store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = str(config_only(tmp_path / "model"))
    part = copied(store, tmp_path / "part", without=("weights",))
    assert main(["warmup", model, "--check", "--output", str(part)]) == 1
    assert f"missing: weight programs of {model}" in capsys.readouterr().out and not (part / "weights").exists()
    found = states(run_warmup(EngineConfig(model=model), part))
    assert found["plan"] == {"stored": 1} and found["weights"] == {"built": 1} and set(found["cpu"]) == {"stored"}
    assert main(["warmup", model, "--check", "--output", str(part)]) == 0
    made, before = (next(ArtifactStore(root).artifacts("weights")).manifest for root in (part, store))
    assert made == before


def test_a_model_of_which_no_weight_program_can_be_foreseen_is_complete_without(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = EngineConfig(model=str(config_only(tmp_path / "model")))
    part = copied(store, tmp_path / "part", without=("plan", "weights"))
    monkeypatch.setattr("graphserve.models.weight_loading.foreseen_programs", lambda model: [])
    for check in (False, True):
        report = run_warmup(config, part, check=check)
        assert report.is_complete and sum(states(report)["weights"].values()) == 1
    report = run_warmup(EngineConfig(), part)
    assert report.is_complete and states(report)["weights"] == {"stored": 1, "built": 1}
    strict = ArtifactStore(part, is_strict=True)
    assert find_or_compile(EngineConfig(), demo_path(), strict).weight_program is not None


def test_what_a_checkpoint_gave_is_complete_for_its_config(store: Path, tmp_path: Path) -> None:
    part = copied(store, tmp_path / "part", without=("plan", "weights"))
    assert run_warmup(EngineConfig(), part).is_complete
    report = run_warmup(EngineConfig(model=str(config_only(tmp_path / "model"))), part, check=True)
    assert report.is_complete and states(report)["weights"] == {"stored": 1}
    bundle = tmp_path / "bundle.tar.zst"
    assert run_warmup(EngineConfig(), bundle).is_complete
    assert run_warmup(EngineConfig(model=str(tmp_path / "model")), bundle, check=True).is_complete


def test_what_a_checkpoint_unties_is_told_by_warmup(store: Path, tmp_path: Path) -> None:
    shutil.copytree(demo_path(), tmp_path / "model")
    weights = tmp_path / "model" / "model.safetensors"
    tensors = load_file(weights)
    save_file({**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].flip(0)}, weights)
    config = EngineConfig(model=str(tmp_path / "model"))
    part = copied(store, tmp_path / "part", without=("weights",))
    assert not run_warmup(config, part, check=True).is_complete
    first, second, checked = run_warmup(config, part), run_warmup(config, part), run_warmup(config, part, check=True)
    assert states(first)["plan"] == {"built": 1}, "not the one of the config, which is there"
    assert states(second)["plan"] == states(checked)["plan"] == {"stored": 1}
    assert {row.key for row in first.rows} == {row.key for row in second.rows} and checked.is_complete


def test_check_of_a_config_imports_no_transformers(store: Path, tmp_path: Path) -> None:
    model = config_only(tmp_path / "model")
    code = (
        "import sys\n"
        "from graphserve.cli.main import main\n"
        f"status = main(['warmup', {str(model)!r}, '--check', '--output', {str(store)!r}])\n"
        "sys.exit(status or int('transformers' in sys.modules))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stdout + result.stderr


def test_a_start_with_weights_needs_only_what_the_config_gave(store: Path) -> None:
    with LLM(compile_cache=str(store), strict_compile_cache=True) as llm:
        strict = llm.generate(["Once upon a time"], SamplingParams(temperature=0, max_tokens=8), use_tqdm=False)
    with LLM() as llm:
        usual = llm.generate(["Once upon a time"], SamplingParams(temperature=0, max_tokens=8), use_tqdm=False)
    assert strict[0].outputs[0].token_ids == usual[0].outputs[0].token_ids


def test_a_checkpoint_that_is_converted_at_load_needs_only_what_the_config_gave(
    shared_models: Path, tmp_path: Path
) -> None:
    checkpoint = (
        shared_models / "stories260K-mixtral-exact"
    )  # each expert's matrices apart, joined when they are loaded
    (tmp_path / "model").mkdir()
    shutil.copy(checkpoint / "config.json", tmp_path / "model")
    assert run_warmup(EngineConfig(model=str(tmp_path / "model")), tmp_path / "store").is_complete
    params = SamplingParams(temperature=0, max_tokens=8)
    with LLM(str(checkpoint), compile_cache=str(tmp_path / "store"), strict_compile_cache=True) as llm:
        strict = llm.generate(["Once upon a time"], params, use_tqdm=False)
    with LLM(str(checkpoint)) as llm:
        usual = llm.generate(["Once upon a time"], params, use_tqdm=False)
    assert strict[0].outputs[0].token_ids == usual[0].outputs[0].token_ids


def test_a_model_of_other_depth_takes_the_kernels_of_the_first(store: Path, tmp_path: Path) -> None:
    deeper = config_only(tmp_path / "deeper", num_hidden_layers=7)
    found = states(run_warmup(EngineConfig(model=str(deeper)), store))
    assert found["plan"] == {"built": 1} and set(found["cpu"]) == {"stored"}


def test_check_of_an_empty_store_is_status_1_names_all_and_stores_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for output in (tmp_path / "store", tmp_path / "x.tar.zst"):
        assert main(["warmup", "--check", "--output", str(output)]) == 1
        assert "missing: plan of demo" in capsys.readouterr().out
    assert not list(tmp_path.rglob("*.json")) and not (tmp_path / "x.tar.zst").exists()


def test_check_names_a_library_that_was_deleted(store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = tmp_path / "x.tar.zst"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRAPHSERVE_CACHE", str(store))
        assert run_warmup(EngineConfig(), bundle).is_complete
    assert run_warmup(EngineConfig(), bundle, check=True).is_complete
    part = tmp_path / "part"
    assert main(["cache", "import", str(bundle), "--store", str(part)]) == 0
    library = next(a for a in ArtifactStore(part).artifacts("cpp") if a.manifest.factors["family"] == "rope_kv")
    library.folder.rename(tmp_path / "away")
    (missing,) = run_warmup(EngineConfig(), part, check=True).missing
    assert missing == f"C++ library {library.manifest.label}: nothing stored for it"
    monkeypatch.setattr("graphserve.compiler.warmup.compiler", lambda: None)
    (missing,) = run_warmup(EngineConfig(), part).missing
    assert missing.endswith("no C++ compiler was found")


def test_check_names_the_compiler_that_is_another(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # By its module's name: the package has a function of the same name.
    module = importlib.import_module("graphserve.kernels.cpu.build")
    monkeypatch.setattr(module, "compiler_version", lambda: "g++ (of a test) 99.1.0")
    missing = run_warmup(EngineConfig(), store, check=True).missing
    assert missing and all("C++ compiler" in row and "→ 99.1.0" in row for row in missing)


@pytest.mark.parametrize("name", ["file", "file/store", "folder.tar.zst", "file/x.tar.zst"])
def test_a_place_that_keeps_nothing_is_refused_before_anything_is_compiled(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "folder.tar.zst").mkdir()
    monkeypatch.setattr("graphserve.compiler.warmup._plan", None)  # would be called first
    assert main(["warmup", "--output", str(tmp_path / name)]) == 2
    assert str(tmp_path) in capsys.readouterr().err


def test_a_bundle_is_made_where_the_cache_of_the_user_cannot_be_written(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GRAPHSERVE_CACHE", str(store))
    assert run_warmup(EngineConfig(), tmp_path / "x.tar.zst").is_complete
    before = (tmp_path / "x.tar.zst").read_bytes()
    monkeypatch.setattr(ArtifactStore, "is_writable", property(lambda self: self.root != store))
    report = run_warmup(EngineConfig(), tmp_path / "x.tar.zst")
    assert report.is_complete and set(states(report)["cpu"]) == {"stored"}, "what the bundle has was made again"
    assert (tmp_path / "x.tar.zst").read_bytes() == before


def test_a_small_limit_deletes_nothing_of_what_was_made_now(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    cache = copied(store, tmp_path / "cache", without=())
    other = ArtifactStore(cache).put("plan", {"config": "of another model"}, {"plan.json": b"{}"}, "another plan")
    monkeypatch.setenv("GRAPHSERVE_CACHE", str(cache))
    monkeypatch.setenv("GRAPHSERVE_CACHE_LIMIT", "1K")
    assert run_warmup(EngineConfig()).is_complete and run_warmup(EngineConfig(), check=True).is_complete
    assert "more than its limit of 1.0 KiB" in caplog.text and not other.folder.exists()
    monkeypatch.setenv("GRAPHSERVE_CACHE_LIMIT", "1GB")
    with pytest.raises(ConfigError, match="GRAPHSERVE_CACHE_LIMIT: '1GB' is not a size"):
        run_warmup(EngineConfig())


def test_a_config_without_a_dtype_serves_weights_in_that_of_its_row(tmp_path: Path) -> None:
    config = json.loads((demo_path() / "config.json").read_text())
    for name in ("dtype", "torch_dtype"):
        config.pop(name, None)
    for folder in ("config", "model"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "config.json").write_text(json.dumps(config))
    alone = EngineConfig(model=str(tmp_path / "config"))
    row = run_warmup(alone, tmp_path / "store", check=True).rows[0]
    assert "dtype float32: config.json names none" in row.name
    for dtype in (torch.float32, torch.bfloat16):
        save_file(
            {"x": torch.zeros(4, dtype=dtype), "ids": torch.zeros(9, dtype=torch.int64)},
            tmp_path / "model" / "model.safetensors",
        )
        named = EngineConfig(model=str(tmp_path / "config"), dtype=str(dtype).removeprefix("torch."))
        with_weights = folder_factors(EngineConfig(model=str(tmp_path / "model")), tmp_path / "model")
        assert with_weights == folder_factors(named, tmp_path / "config")
        assert (with_weights == folder_factors(alone, tmp_path / "config")) == (dtype == torch.float32)


def test_check_says_that_it_cannot_know_the_kernels_of_a_plan_that_is_gone(store: Path, tmp_path: Path) -> None:
    part = copied(store, tmp_path / "part", without=("plan",))
    assert "kernels: which ones follows from the plan" in run_warmup(EngineConfig(), part, check=True).missing


@pytest.mark.parametrize(("options", "told"), [(["--target", ""], "target ''"), (["--jobs", "0"], "--jobs 0")])
def test_options_that_build_nothing_are_refused(
    options: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["warmup", *options]) == 2 and told in capsys.readouterr().err


def test_targets_may_be_repeated_and_have_spaces(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["warmup", "--check", "--report", "--target", "cpu, cpu", "--output", str(store)]) == 0
    rows = json.loads(capsys.readouterr().out)["artifacts"]
    assert len({row["name"] for row in rows}) == len(rows)


def test_measured_choices_are_stored_once_and_a_start_takes_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(measure_choices, "usable_threads", lambda: 4)
    # As on a machine where a step is fastest on two threads.
    monkeypatch.setattr(measure_choices, "step_seconds", lambda executor, step, clock: fewest_seconds(executor))
    warmup = ["warmup", "--measure", "--max-num-seqs", "8", "--output", str(tmp_path)]
    assert main([*warmup, "--check"]) == 1
    assert "missing: measured choices for" in capsys.readouterr().out
    for state in ("built", "stored"):
        assert main([*warmup, "--report"]) == 0
        rows = json.loads(capsys.readouterr().out)["artifacts"]
        assert [row["state"] for row in rows if row["group"] == "choices"] == [state]
    assert main([*warmup, "--check"]) == 0 and main(warmup[:1] + warmup[2:] + ["--check"]) == 0

    params = SamplingParams(temperature=0, max_tokens=8)
    with LLM(compile_cache=str(tmp_path), strict_compile_cache=True, max_num_seqs=8) as llm:
        chosen = llm.llm_engine._core._executor._runner.choices
        assert chosen.decode == {n: StepChoice(num_threads=2) for n in (1, 2, 4, 8)}
        with_choices = llm.generate(["Once upon a time"], params, use_tqdm=False)
    with LLM() as llm:
        assert llm.generate(["Once upon a time"], params, use_tqdm=False)[0].outputs[0].token_ids == (
            with_choices[0].outputs[0].token_ids
        )


def fewest_seconds(executor: ModelExecutor) -> float:
    (choice,) = executor._runner.choices.decode.values()
    return {None: 1.0, 1: 1.5, 2: 0.5}[choice.num_threads]


def test_steps_are_measured_with_random_weights_where_there_are_none(tmp_path: Path) -> None:
    config = EngineConfig(model=str(config_only(tmp_path / "model")), max_num_seqs=2)
    report = run_warmup(config, tmp_path / "store", measure=measure_choices.measure_choices)
    assert report.is_complete and states(report)["choices"] == {"built": 1}


def test_measuring_for_a_device_that_is_not_here_is_refused(tmp_path: Path) -> None:
    config = EngineConfig(device="cpu")
    with pytest.raises(ConfigError, match="at hand, cpu, which is not among the targets cuda:90, hip:gfx942"):
        run_warmup(config, tmp_path, ("cuda:90", "hip:gfx942"), measure=measure_choices.measure_choices)
    assert not list(tmp_path.iterdir())


def test_measuring_is_refused_where_a_fixed_order_leaves_nothing_to_choose(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="deterministic=True"):
        run_warmup(EngineConfig(deterministic=True), tmp_path, measure=measure_choices.measure_choices)


def test_the_report_has_a_row_for_each_artifact(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["warmup", "--report", "--check", "--output", str(store)]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["complete"] and {row["group"] for row in report["artifacts"]} >= {"plan", "weights"}
    assert all(row["key"] and row["num_bytes"] > 0 for row in report["artifacts"])


@pytest.mark.parametrize("target", ["cuda:70", "gpu", "cpu:mmx"])
def test_an_unknown_target_is_refused_before_anything_is_compiled(target: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"'{target}' is unknown: use one of cpu, .*cuda:90"):
        run_warmup(EngineConfig(), tmp_path, targets=("cpu", target))
    assert not list(tmp_path.iterdir())


@pytest.mark.full
def test_every_level_and_a_gpu_are_built_here_without_having_them(tmp_path: Path) -> None:
    targets = [*(f"cpu:{level}" for level in ISA_LEVELS), "cuda:90", "hip:gfx942"]
    report = run_warmup(EngineConfig(), tmp_path, targets)
    assert report.is_complete and {row.group for row in report.rows} >= set(targets)
    again = run_warmup(EngineConfig(), tmp_path, targets)
    assert all(row.state == "stored" for row in again.rows)
