"""What cannot be served is refused in a sentence that names the module and the reason."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from graphserve.compiler.refusals import MARKER, trace_failure_reason
from graphserve.errors import UnsupportedModelError
from tests.compiler.compiled import compiled, compiled_tiny
from tests.tiny_models import tiny_config


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("mamba2", ["backbone.layers.0", "Mamba2Mixer", "recurrent state"]),
        ("jamba", ["model.layers.0", "JambaMambaMixer", "recurrent state"]),
        ("codegen", ["transformer.h.0", "CodeGenAttention", "attention code of a model's own"]),
        ("gptj", ["gptj", "AttentionInterface"]),
        ("roberta", ["roberta.embeddings", "RobertaEmbeddings", "padding_idx + 1"]),
    ],
)
def test_a_refusal_before_the_trace_names_module_and_reason(name: str, parts: list[str]) -> None:
    with pytest.raises(UnsupportedModelError) as caught:
        compiled_tiny(name)
    assert [part for part in parts if part not in str(caught.value)] == []


def test_a_model_that_reads_its_mask_is_refused_with_its_file() -> None:
    with pytest.raises(
        UnsupportedModelError, match=r"computes with the attention mask itself.*modeling_deepseek_v32\.py"
    ):
        compiled_tiny("deepseek_v32")


def test_unknown_experts_are_refused_by_module() -> None:
    with pytest.raises(UnsupportedModelError, match=r"model\.layers\.0\.mlp\.experts: unknown expert activation"):
        compiled_tiny("deepseek_v4")


def test_an_activation_with_a_clamp_is_not_taken_for_one_without() -> None:
    class Clamped(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.silu(x.clamp(max=50.0))

    from graphserve.compiler.experts import _identify

    class Experts(nn.Module):
        is_concatenated, has_gate = True, False
        act_fn: nn.Module

    experts = Experts()
    experts.act_fn = nn.SiLU()
    assert _identify("experts", experts) == ("silu", 0.0, 0.0, "")
    experts.act_fn = Clamped()
    assert _identify("experts", experts)[3] == "experts: unknown expert activation"


def test_a_trace_for_some_token_counts_only_is_refused_with_its_guards() -> None:
    with pytest.raises(UnsupportedModelError, match="holds only for some token counts T") as caught:
        compiled(tiny_config("zaya"))
    assert caught.value.guards and all("T" in guard for guard in caught.value.guards)


def test_a_reason_of_our_own_comes_out_of_dynamos_report_as_it_was() -> None:
    error = RuntimeError(
        f'Observed exception\n context: raised exception RuntimeError("{MARKER}Mixer: no (such) op")\n'
    )
    assert trace_failure_reason(error) == "Mixer: no (such) op"


def test_an_explanation_is_taken_from_dynamos_report() -> None:
    error = RuntimeError("Unsupported call\n  Explanation: Dynamo cannot trace id().\n  Hint: none\n")
    assert trace_failure_reason(error) == "Dynamo cannot trace id()"
    assert trace_failure_reason(RuntimeError("first line\nsecond line")) == "first line"
