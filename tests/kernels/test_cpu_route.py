"""The generated router against the reference: the same experts in the same order, ties included, and their weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cpu_kernel_cases import Case, assert_close
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from graphserve.artifacts import ArtifactStore
from graphserve.kernels.arg_spec import ArgSpec, Refusal
from graphserve.kernels.cpu import build, compiler, generate, isa_level
from graphserve.kernels.route import NORMALIZE, SCORES

PLAIN = {
    "top_k": 2, "scores": "softmax", "normalize": "none", "eps": 0.0, "min_sum": 0.0, "scale": 1.0,
    "num_groups": 1, "top_groups": 1, "group_top": 1, "dtype": "float32",
}  # fmt: skip


def route_case(name: str, logits: Tensor, bias: Tensor | None = None, **attrs: Any) -> Case:
    dynamic: dict[tuple[int | str, int], str] = {(0, 0): "T", ("out", 0): "T"}
    return Case(name, "route", PLAIN | attrs, [logits, bias], dynamic, {"T": logits.shape[0]})


def check(cases: list[Case], store: ArtifactStore) -> None:
    """Ids equal those of the reference, weights are close, on two threads."""
    if compiler() is None:
        pytest.skip("needs a C++ compiler")
    kernels = [case.kernel(isa_level()) for case in cases]
    library = build(kernels, store)
    for case, kernel in zip(cases, kernels, strict=True):
        weights, ids = case.run(library.function_pointer(kernel.symbol), library, 2)
        expected_weights, expected_ids = case.expected()
        assert torch.equal(ids, expected_ids), case.name
        assert weights.dtype == getattr(torch, case.attrs["dtype"])
        torch.testing.assert_close(weights.isnan(), expected_weights.isnan())
        assert_close(*(torch.nan_to_num(w, posinf=9.0, neginf=-9.0) for w in (weights, expected_weights.float())))


def test_the_routers_of_known_models_at_every_isa_level(check_cases) -> None:
    torch.manual_seed(0)
    deepseek = {
        "top_k": 6, "scores": "sigmoid", "normalize": "sum", "eps": 1e-20, "scale": 2.5,
        "num_groups": 8, "top_groups": 4, "group_top": 2,
    }  # fmt: skip
    cases = [
        route_case("qwen3 moe", torch.randn(37, 128), top_k=8, normalize="sum", dtype="bfloat16"),
        route_case("mixtral", torch.randn(5, 8).bfloat16(), normalize="sum"),
        route_case("gpt-oss", torch.randn(5, 32), torch.randn(32), top_k=4, scores="none", normalize="softmax"),
        route_case("deepseek v3", torch.randn(9, 64), torch.rand(64) * 0.1, **deepseek),
        route_case("llama 4", torch.randn(3, 16).bfloat16(), top_k=1, scores="none", normalize="sigmoid"),
        route_case("floor of the sum", torch.randn(3, 16), normalize="sum", scores="sigmoid", min_sum=3.0),
        route_case("column slice", torch.randn(6, 50)[:, 3:23], torch.randn(20).bfloat16()),
    ]
    check_cases(cases, core=("deepseek",))


@pytest.mark.parametrize("experts", [4, 130])
def test_of_equal_choices_the_reference_s_are_taken(kernel_store: ArtifactStore, experts: int) -> None:
    torch.manual_seed(experts)
    cases = []
    for top_k in sorted({1, 2, experts // 2, experts}):
        # So few different logits that most choices are between equals.
        logits = torch.cat([torch.randint(0, levels, (25, experts)).float() for levels in (1, 2, 5)])
        cases.append(route_case(f"top {top_k}", logits, top_k=top_k))
    if experts > 4:
        logits = torch.randint(0, 2, (25, experts)).float()
        groups = {"num_groups": 5, "top_groups": 2, "group_top": 2}
        cases.append(route_case("groups", logits, scores="none", top_k=experts // 4, **groups))
    check(cases, kernel_store)


@st.composite
def routers(draw: st.DrawFn) -> Case:
    experts = draw(st.integers(1, 12)) * draw(st.sampled_from([1, 4, 16]))
    num_groups = draw(st.sampled_from([g for g in (1, 2, 4, 8) if experts % g == 0]))
    top_groups = draw(st.integers(1, num_groups))
    size = experts // num_groups
    attrs = {
        "scores": draw(st.sampled_from(SCORES)), "normalize": draw(st.sampled_from(NORMALIZE)),
        "eps": draw(st.sampled_from([0.0, 1e-20, 1e-3])), "scale": draw(st.sampled_from([1.0, 2.5])),
        "min_sum": draw(st.sampled_from([0.0, 0.5])), "dtype": draw(st.sampled_from(["float32", "bfloat16"])),
        "num_groups": num_groups, "top_groups": top_groups, "group_top": draw(st.integers(1, size)),
        "top_k": draw(st.integers(1, top_groups * size)),
    }  # fmt: skip
    torch.manual_seed(draw(st.integers(0, 99)))
    # Positive, so that sums of plain logits stay away from zero, and far enough apart that no rounding reorders them.
    rows = draw(st.integers(1, 40))
    logits = torch.stack([torch.randperm(experts) for _ in range(rows)]) * (4.0 / experts) + 0.5
    logits = logits.to(draw(st.sampled_from([torch.float32, torch.bfloat16])))
    bias = torch.rand(experts) * 1e-4 if draw(st.booleans()) and logits.dtype == torch.float32 else None
    return route_case(f"{experts} experts {attrs}", logits, bias, **attrs)


@settings(max_examples=2, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(routers(), min_size=5, max_size=5))
def test_any_router_gives_what_the_reference_gives(kernel_store: ArtifactStore, cases: list[Case]) -> None:
    check(cases, kernel_store)


def test_logits_that_are_not_numbers_are_chosen_first_as_the_reference_does(kernel_store: ArtifactStore) -> None:
    logits = torch.randn(6, 40)
    logits[0, 7] = logits[2, 3] = logits[2, 9] = float("nan")
    logits[1, :38], logits[3] = float("-inf"), float("-inf")
    logits[4, 11] = float("inf")
    check([route_case("ends", logits, top_k=4, scores="none", normalize="none")], kernel_store)


def test_a_row_does_not_depend_on_the_rows_beside_it(kernel_store: ArtifactStore) -> None:
    logits = torch.randn(64, 100)
    whole, one = (route_case("rows", rows, top_k=5, normalize="sum") for rows in (logits, logits[63:]))
    kernel = whole.kernel(isa_level())
    library = build([kernel], kernel_store)
    function = library.function_pointer(kernel.symbol)
    for all_rows, last_row in zip(whole.run(function, library, 2), one.run(function, library, 1), strict=True):
        assert torch.equal(all_rows[63:], last_row)


def refusal(logits: ArgSpec, **attrs: Any) -> str:
    weights = [ArgSpec("float32", ("T", 2)), ArgSpec("int64", ("T", 2))]
    result = generate("gs.route", PLAIN | attrs, [logits, None], weights, "generic")
    assert isinstance(result, Refusal), result
    return result.reason


def test_what_the_router_cannot_do_is_refused_by_name() -> None:
    assert "float16" in refusal(ArgSpec("float16", ("T", 8)))
    assert "5000 experts" in refusal(ArgSpec("float32", ("T", 5000)))
    assert "contiguous" in refusal(ArgSpec("float32", ("T", 8), (16, 2)))
    assert "softplus" in refusal(ArgSpec("float32", ("T", 8)), scores="softplus")
    assert "3 groups" in refusal(ArgSpec("float32", ("T", 8)), num_groups=3)
