"""Loading published checkpoint layouts equals transformers; wrong checkpoints are refused by name before any read."""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from graphserve.errors import CheckpointError, UnsupportedModelError
from graphserve.models import weight_loading
from graphserve.models.checkpoint import Checkpoint
from graphserve.models.config import load_config
from graphserve.models.meta_model import build_meta_model, non_persistent_buffers
from graphserve.models.weight_loading import (
    check_checkpoint,
    different_ties,
    dummy_parameters,
    foreseen_programs,
    load_parameters,
    run_program,
    stored_dtype,
)
from graphserve.models.weight_program import Concat, Load, ParameterRule, Stack, WeightProgram, evaluate
from tests.tiny_models import architectures, tiny_config, tiny_model

Tensors = dict[str, torch.Tensor]


def meta(folder: Path, dtype: torch.dtype = torch.float32) -> nn.Module:
    return build_meta_model(load_config(folder), dtype, "eager", "eager")


def save_tiny(name: str, folder: Path, **options: object) -> nn.Module:
    """A random model written as transformers publishes it: save_pretrained undoes the conversions of loading."""
    model = tiny_model(tiny_config(name))
    model.save_pretrained(folder, **options)
    return model


def edit(folder: Path, change: Callable[[Tensors], None]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(
        {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()},
        folder / "model.safetensors",
    )


def _drop(*names: str) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        for name in names:
            del tensors[name]

    return change


def assert_same_values(found: Tensors, expected: Tensors) -> None:
    assert found.keys() == expected.keys()
    different = [name for name in expected if found[name].dtype != expected[name].dtype]
    different += [name for name in expected if not torch.equal(found[name], expected[name])]
    assert different == []


def assert_loads_like_transformers(folder: Path, dtype: torch.dtype) -> None:
    model = meta(folder, dtype)
    expected = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    found = dict(load_parameters(model, folder))
    assert_same_values(found, expected.state_dict())
    assert all(tensor.device.type == "cpu" and tensor.is_contiguous() for tensor in found.values())
    assert_same_values(non_persistent_buffers(model), dict(expected.named_non_persistent_buffers()))


def test_the_comparison_sees_one_wrong_value_and_a_wrong_dtype() -> None:
    with pytest.raises(AssertionError):
        assert_same_values({"a": torch.ones(3)}, {"a": torch.tensor([1.0, 1.0, 1.1])})
    with pytest.raises(AssertionError):
        assert_same_values({"a": torch.ones(3).half()}, {"a": torch.ones(3)})


# A tensor name of the published layout, which differs from the model's own names for all of these.
PUBLISHED = {
    "mixtral": "model.layers.0.block_sparse_moe.experts.5.w2.weight",
    "qwen3_moe": "model.layers.0.mlp.experts.5.gate_proj.weight",
    "qwen2_moe": "model.layers.0.mlp.experts.5.down_proj.weight",
    "deepseek_v3": "model.layers.1.mlp.experts.5.up_proj.weight",
    "glm4_moe": "model.layers.1.mlp.experts.0.gate_proj.weight",
    "olmoe": "model.layers.0.mlp.experts.0.gate_proj.weight",
    "minimax_m2": "model.layers.0.block_sparse_moe.experts.0.w1.weight",
    "phimoe": "model.layers.0.block_sparse_moe.experts.0.w1.weight",
    "granitemoe": "model.layers.0.block_sparse_moe.input_linear.weight",
    "ernie4_5_moe": "model.layers.1.mlp.experts.0.gate_proj.weight",
    "jamba": "model.layers.1.feed_forward.experts.0.gate_proj.weight",
    "gpt_neox": "embed_out.weight",
}
OWN_LAYOUT = [
    "llama",
    "gemma3_text",
    "gpt_oss",
    "llama4_text",
    "gpt2",
    "opt",
    "falcon",
    "bloom",
    "phi3",
    "longcat_flash",
]


@pytest.mark.parametrize("name", [*PUBLISHED, *OWN_LAYOUT])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_published_layout_loads_like_transformers(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    save_tiny(name, tmp_path)
    if name in PUBLISHED:
        assert PUBLISHED[name] in Checkpoint.open(tmp_path).tensors
        assert PUBLISHED[name] not in meta(tmp_path).state_dict()
    assert_loads_like_transformers(tmp_path, dtype)


@pytest.mark.parametrize("name", [*PUBLISHED, *OWN_LAYOUT])
def test_the_layout_and_program_of_a_checkpoint_are_foreseen_from_its_config(name: str, tmp_path: Path) -> None:
    save_tiny(name, tmp_path)
    program, shapes = foreseen_programs(meta(tmp_path))[0]
    stored = {tensor: entry.shape for tensor, entry in Checkpoint.open(tmp_path).tensors.items()}
    assert shapes == stored
    assert_same_values(dict(run_program(program, tmp_path)), dict(load_parameters(meta(tmp_path), tmp_path)))


@pytest.mark.full
@pytest.mark.parametrize("name", architectures())
def test_every_architecture_loads_like_transformers_or_is_refused_by_name(name: str, tmp_path: Path) -> None:
    try:
        save_tiny(name, tmp_path)
    except Exception as error:  # noqa: BLE001 - whatever stops transformers itself from building it
        pytest.skip(f"transformers cannot build a tiny {name}: {error}")
    try:
        built = type(meta(tmp_path))
        if built is not type(AutoModelForCausalLM.from_pretrained(tmp_path)):
            return  # a multimodal wrapper, of which only the text model is served
        assert_loads_like_transformers(tmp_path, torch.float32)
    except UnsupportedModelError as error:
        assert name in {"falcon_h1", "emu3", "mllama"}, error


@pytest.mark.parametrize(
    "name",
    [
        "stories260K",
        "stories260K-hd64",
        "stories260K-mistral-swa64",
        "stories260K-mixtral-exact",
        "stories-qwen3-chat",
        "stories-qwen3-moe",
    ],
)
def test_a_real_checkpoint_loads_like_transformers(name: str, shared_models: Path) -> None:
    assert_loads_like_transformers(shared_models / name, torch.bfloat16)


def test_parameters_that_a_model_keeps_in_float32_stay_there(tmp_path: Path) -> None:
    save_tiny("deepseek_v3", tmp_path)
    found = dict(load_parameters(meta(tmp_path, torch.bfloat16), tmp_path))
    assert found["model.layers.1.mlp.gate.e_score_correction_bias"].dtype == torch.float32
    assert found["model.layers.1.mlp.gate.weight"].dtype == torch.bfloat16


@pytest.mark.parametrize("stored", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_any_stored_float_dtype_is_converted(stored: torch.dtype, tmp_path: Path) -> None:
    model = save_tiny("llama", tmp_path)
    edit(tmp_path, lambda tensors: tensors.update({name: value.to(stored) for name, value in tensors.items()}))
    assert stored_dtype(tmp_path) == stored
    found = dict(load_parameters(meta(tmp_path, torch.float16), tmp_path))
    expected = {name: value.to(stored).to(torch.float16) for name, value in model.state_dict().items()}
    assert_same_values(found, expected)


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_a_sharded_checkpoint_loads_like_a_single_file(name: str, tmp_path: Path) -> None:
    model = save_tiny(name, tmp_path, max_shard_size="150KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert_same_values(dict(load_parameters(meta(tmp_path), tmp_path)), model.state_dict())


def test_tensors_come_in_file_order(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path, max_shard_size="100KB")
    checkpoint = Checkpoint.open(tmp_path)
    names = [name for name, _ in load_parameters(meta(tmp_path), tmp_path) if name in checkpoint.tensors]
    assert names == list(checkpoint.tensors)


@pytest.mark.parametrize("ahead_bytes", [0, 10_000, 1 << 30])
def test_reading_ahead_changes_no_value_and_is_bounded(
    ahead_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_tiny("mixtral", tmp_path)
    expected = dict(load_parameters(meta(tmp_path), tmp_path))
    program = check_checkpoint(meta(tmp_path), tmp_path)
    largest = max(rule.num_bytes for rule in program.rules.values())
    started: list[int] = []

    def counted(rule: ParameterRule, *rest: object) -> torch.Tensor:
        started.append(rule.num_bytes)
        return evaluate(rule, *rest)

    monkeypatch.setattr(weight_loading, "READ_AHEAD_BYTES", ahead_bytes)
    monkeypatch.setattr(weight_loading, "evaluate", counted)
    found, taken = {}, 0
    for name, tensor in run_program(program, tmp_path):
        found[name] = tensor
        assert sum(started) - taken <= max(ahead_bytes, largest) + largest
        taken += tensor.nbytes if name in program.rules else 0
    assert_same_values(found, expected)


def test_a_reader_s_error_reaches_the_consumer_and_an_early_end_stops_the_readers(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path)
    program = check_checkpoint(meta(tmp_path), tmp_path)
    stream = run_program(program, tmp_path)
    next(stream)
    stream.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("weight reader")]
    stream = run_program(program, tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match="truncated after the check"):
        list(stream)


def test_progress_counts_every_byte_once(tmp_path: Path) -> None:
    save_tiny("mixtral", tmp_path)
    reports: list[tuple[str, int, int]] = []
    model = meta(tmp_path)
    list(load_parameters(model, tmp_path, lambda *report: reports.append(report)))
    total = sum(parameter.nbytes for parameter in model.parameters())
    assert reports[0] == ("load weights", 0, total) and reports[-1] == ("load weights", total, total)
    assert [done for _, done, _ in reports] == sorted(done for _, done, _ in reports)


def test_a_program_stored_as_json_runs_without_the_model(tmp_path: Path) -> None:
    model = save_tiny("qwen3_moe", tmp_path)
    program = check_checkpoint(meta(tmp_path), tmp_path)
    decoded = msgspec.json.decode(msgspec.json.encode(program), type=WeightProgram)
    assert_same_values(dict(run_program(decoded, tmp_path)), model.state_dict())


def test_a_program_is_not_run_on_another_checkpoint(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path)
    program = check_checkpoint(meta(tmp_path), tmp_path)
    edit(tmp_path, lambda tensors: tensors.update({"model.norm.weight": torch.ones(65)}))
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight: expected shape \[64\], found \[65\]"):
        list(run_program(program, tmp_path))
    edit(tmp_path, _drop("model.norm.weight"))
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight is missing"):
        run_program(program, tmp_path)


def test_experts_become_one_stacked_and_joined_parameter(tmp_path: Path) -> None:
    save_tiny("mixtral", tmp_path)
    rule = check_checkpoint(meta(tmp_path), tmp_path).rules["model.layers.2.mlp.experts.gate_up_proj"]
    prefix = "model.layers.2.block_sparse_moe.experts"
    assert rule.value == Concat(
        tuple(Stack(tuple(Load(f"{prefix}.{e}.{w}.weight") for e in range(6)), 0) for w in ("w1", "w3")), 1
    )


def test_experts_are_ordered_by_number_not_by_text(tmp_path: Path) -> None:
    config = tiny_config("mixtral")
    config.num_local_experts = 12
    model = tiny_model(config)
    model.save_pretrained(tmp_path)
    assert_same_values(dict(load_parameters(meta(tmp_path), tmp_path)), model.state_dict())


# --- tied embeddings -------------------------------------------------------------------------------------------------

EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def save_tied(folder: Path) -> torch.Tensor:
    config = tiny_config("llama")
    config.tie_word_embeddings = True
    model = tiny_model(config)
    model.save_pretrained(folder)
    assert HEAD not in Checkpoint.open(folder).tensors
    return model.state_dict()[EMBED]


def _rename_to_head(tensors: Tensors) -> None:
    tensors[HEAD] = tensors.pop(EMBED)


def _store_both(tensors: Tensors) -> None:
    tensors[HEAD] = tensors[EMBED].clone()


@pytest.mark.parametrize("change", [lambda tensors: None, _rename_to_head, _store_both], ids=["embed", "head", "both"])
def test_a_tied_head_loads_under_either_name_or_both(change: Callable[[Tensors], None], tmp_path: Path) -> None:
    expected = save_tied(tmp_path)
    edit(tmp_path, change)
    found = dict(load_parameters(meta(tmp_path), tmp_path))
    assert found[EMBED] is found[HEAD] and torch.equal(found[EMBED], expected)


def test_a_tied_head_is_foreseen_once_and_twice(tmp_path: Path) -> None:
    expected = save_tied(tmp_path)
    for change in (lambda tensors: None, _store_both):
        edit(tmp_path, change)
        stored = {name: entry.shape for name, entry in Checkpoint.open(tmp_path).tensors.items()}
        (program,) = [program for program, shapes in foreseen_programs(meta(tmp_path)) if shapes == stored]
        assert set(program.stored_twice) == {HEAD} & set(stored) and program.aliases == {HEAD: EMBED}
        found = dict(run_program(program, tmp_path))
        assert found[EMBED] is found[HEAD] and torch.equal(found[EMBED], expected)
    edit(tmp_path, lambda tensors: tensors[HEAD][0, 0].add_(1))
    assert different_ties(program, tmp_path) == [HEAD]


def test_a_tied_pair_is_one_if_it_is_so_in_the_dtype_that_is_served(tmp_path: Path) -> None:
    embed = save_tied(tmp_path)
    edit(tmp_path, lambda tensors: tensors.update({HEAD: embed.bfloat16()}))
    served_bf16, served_fp32 = (
        check_checkpoint(meta(tmp_path, dtype), tmp_path) for dtype in (torch.bfloat16, torch.float32)
    )
    assert different_ties(served_bf16, tmp_path) == [] and different_ties(served_fp32, tmp_path) == [HEAD]
    edit(tmp_path, lambda tensors: tensors.update({HEAD: embed.to(torch.float8_e4m3fn)}))
    assert different_ties(served_bf16, tmp_path) == [HEAD]


def test_a_stored_program_is_not_run_on_other_kinds_of_values(tmp_path: Path) -> None:
    embed, norm = save_tied(tmp_path), "model.norm.weight"
    edit(tmp_path, _store_both)
    program = check_checkpoint(meta(tmp_path), tmp_path)
    edit(tmp_path, lambda tensors: tensors.update({HEAD: embed.to(torch.int8)}))
    with pytest.raises(CheckpointError, match=r"lm_head\.weight: expected float values, found I8"):
        different_ties(program, tmp_path)
    edit(tmp_path, lambda tensors: tensors.update({norm: tensors[norm].to(torch.uint16)}))
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight: expected float values, found U16"):
        run_program(program, tmp_path)


def test_a_tied_head_under_neither_name_is_missing(tmp_path: Path) -> None:
    save_tied(tmp_path)
    edit(tmp_path, _drop(EMBED))
    with pytest.raises(CheckpointError, match=r"embed_tokens\.weight is missing \(nor its tied name lm_head\.weight\)"):
        check_checkpoint(meta(tmp_path), tmp_path)


def test_a_tied_head_stored_with_other_values_is_untied(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    embed = save_tied(tmp_path)
    head = torch.randn_like(embed)
    edit(tmp_path, lambda tensors: tensors.update({HEAD: head}))
    model = meta(tmp_path)
    found = dict(load_parameters(model, tmp_path))
    assert torch.equal(found[EMBED], embed) and torch.equal(found[HEAD], head)
    assert model.get_parameter(HEAD) is not model.get_parameter(EMBED)
    assert "holds different values" in caplog.text
    assert_same_values(found, AutoModelForCausalLM.from_pretrained(tmp_path).state_dict())


# --- names -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "prefix"), [("llama", "model."), ("gpt2", "transformer."), ("mixtral", "model.")])
def test_a_checkpoint_of_the_base_model_lacks_the_prefix(name: str, prefix: str, tmp_path: Path) -> None:
    config = tiny_config(name)
    config.tie_word_embeddings = True
    model = tiny_model(config)
    model.save_pretrained(tmp_path)

    def strip(tensors: Tensors) -> None:
        for tensor in [tensor for tensor in tensors if tensor.startswith(prefix)]:
            tensors[tensor.removeprefix(prefix)] = tensors.pop(tensor)

    edit(tmp_path, strip)
    assert not any(tensor.startswith(prefix) for tensor in Checkpoint.open(tmp_path).tensors)
    assert_same_values(dict(load_parameters(meta(tmp_path), tmp_path)), model.state_dict())


@pytest.mark.parametrize("layout", ["model.language_model.", "language_model.model."])
def test_the_text_model_of_a_multimodal_checkpoint_is_found(
    layout: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = save_tiny("gemma3_text", tmp_path)

    def wrap(tensors: Tensors) -> None:
        for name in [name for name in tensors if name.startswith("model.")]:
            tensors[layout + name.removeprefix("model.")] = tensors.pop(name)
        tensors["vision_tower.vision_model.embeddings.weight"] = torch.ones(2)

    edit(tmp_path, wrap)
    text_config = json.loads((tmp_path / "config.json").read_text())
    wrapper = AutoConfig.for_model("gemma3").to_dict() | {"text_config": text_config, "tie_word_embeddings": True}
    (tmp_path / "config.json").write_text(json.dumps(wrapper))
    with caplog.at_level(logging.INFO):
        found = dict(load_parameters(meta(tmp_path), tmp_path))
    assert_same_values(found, model.state_dict())
    assert "1 tensors belong to other parts of a multimodal model" in caplog.text
    assert "used by no parameter" not in caplog.text


def test_extra_tensors_are_named_in_one_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = save_tiny("llama", tmp_path)
    extra = {"adapter.x": torch.ones(1), "adapter.y": torch.ones(1)}
    known = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(8) for i in range(2)}
    edit(tmp_path, lambda tensors: tensors.update({**extra, **known}))
    assert_same_values(dict(load_parameters(meta(tmp_path), tmp_path)), model.state_dict())
    (record,) = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert "2 tensors are used by no parameter of LlamaForCausalLM: adapter.x, adapter.y" in record.getMessage()


def test_extra_layers_that_the_model_class_ignores_are_not_mentioned(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save_tiny("deepseek_v3", tmp_path)
    edit(tmp_path, lambda tensors: tensors.update({"model.layers.61.eh_proj.weight": torch.ones(2)}))
    check_checkpoint(meta(tmp_path), tmp_path)
    assert caplog.records == []


# --- wrong checkpoints -----------------------------------------------------------------------------------------------

Q_PROJ = "model.layers.1.self_attn.q_proj.weight"
W1 = "model.layers.1.block_sparse_moe.experts.{}.w1.weight"


def _put(name: str, value: torch.Tensor) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.update({name: value})


WRONG = {
    "missing": ("llama", _drop(Q_PROJ), f"tensor {Q_PROJ} is missing: expected float [64, 64], found none"),
    "shape": (
        "llama",
        _put(Q_PROJ, torch.ones(64, 63)),
        f"model.safetensors: tensor {Q_PROJ}: expected shape [64, 64], found [64, 63]",
    ),
    "integers": (
        "llama",
        _put(Q_PROJ, torch.ones(64, 64, dtype=torch.int32)),
        f"model.safetensors: tensor {Q_PROJ}: expected float values, found I32",
    ),
    "one expert missing": (
        "mixtral",
        _drop(W1.format(2)),
        f"tensor {W1.format(2)} is missing: expected numbers 0 to 5",
    ),
    "last expert missing": (
        "mixtral",
        _drop(W1.format(5)),
        f"tensor {W1.format(5)} is missing: expected numbers 0 to 5",
    ),
    "expert of another shape": ("mixtral", _put(W1.format(3), torch.ones(95, 64)), f"tensor {W1.format(3)} expected"),
    "all gates missing": (
        "mixtral",
        _drop(*(W1.format(e) for e in range(6))),
        "w1.weight that belong to model.layers.1.block_sparse_moe.experts.0.w3.weight are missing",
    ),
    "too many experts": (
        "mixtral",
        lambda tensors: tensors.update(
            {W1.format(6).replace("w1", w): tensors[W1.format(0).replace("w1", w)] for w in ("w1", "w2", "w3")}
        ),
        "which make model.layers.1.mlp.experts.gate_up_proj: expected shape [6, 192, 64], found [7, 192, 64]",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_checkpoint_is_refused_with_tensor_expected_and_found(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, change, message = WRONG[case]
    save_tiny(name, tmp_path)
    edit(tmp_path, change)
    model = meta(tmp_path)

    def no_reading(*args: object, **kwargs: object) -> None:
        raise AssertionError("tensor data was read before the check ended")

    monkeypatch.setattr(Checkpoint, "read", no_reading)
    with pytest.raises(CheckpointError) as raised:
        load_parameters(model, tmp_path)
    assert message in str(raised.value)


def test_all_problems_come_in_one_message_and_the_first_ten_in_full(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path)
    edit(tmp_path, lambda tensors: [tensors.pop(name) for name in list(tensors) if "mlp" in name] and None)
    with pytest.raises(CheckpointError) as raised:
        check_checkpoint(meta(tmp_path), tmp_path)
    lines = str(raised.value).splitlines()
    assert lines[0] == f"checkpoint {tmp_path} cannot be loaded, 12 problems:"
    assert len(lines) == 12 and lines[-1].strip() == "... and 2 more"


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path)
    path = tmp_path / "model.safetensors"
    model = meta(tmp_path)
    with open(path, "r+b") as stream:
        stream.truncate(path.stat().st_size - 100)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: truncated: tensor \S+ expects bytes up to \d+"):
        check_checkpoint(model, tmp_path)


# --- dummy weights ---------------------------------------------------------------------------------------------------


def test_dummy_parameters_are_seeded_small_and_complete(tmp_path: Path) -> None:
    config = tiny_config("deepseek_v3")
    model = build_meta_model(config, torch.bfloat16, "eager", "eager")
    first, again, other = (dict(dummy_parameters(model, seed)) for seed in (1, 1, 2))
    assert_same_values(first, again)
    assert {name: (tensor.shape, tensor.dtype) for name, tensor in first.items()} == {
        name: (tensor.shape, tensor.dtype) for name, tensor in model.state_dict().items()
    }
    assert not torch.equal(first[EMBED], other[EMBED])
    assert 0 < max(float(tensor.abs().max()) for tensor in first.values()) <= 1e-3


def test_the_files_of_these_tests_are_what_the_safetensors_library_reads(tmp_path: Path) -> None:
    save_tiny("mixtral", tmp_path)
    checkpoint = Checkpoint.open(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as reference:
        assert set(reference.keys()) == checkpoint.tensors.keys()
        assert all(torch.equal(reference.get_tensor(name), checkpoint.read(name)) for name in checkpoint.tensors)
