"""Buffers that are alive at the same time never share bytes."""

from __future__ import annotations

from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from graphserve.plan.arena import ALIGNMENT, layout
from graphserve.plan.schema import Launch, Plan, TensorSpec


def plan_of(launches: list[Launch], buffers: dict[str, TensorSpec], output: str) -> Plan:
    return Plan(
        model={}, launches=launches, init=[], buffers=buffers, weights={}, cache_layers=[], cache_groups=[],
        outputs=(output,), passes=[],
    )  # fmt: skip


def launch(inputs: list[str], output: str, kind: Any = "reference") -> Launch:
    return Launch("aten.add.Tensor", tuple({"v": name} for name in inputs), {}, (output,), kind)


def size_bytes(spec: TensorSpec, tokens: int, rows: int) -> int:
    factors = {"T": tokens, "R": rows}
    count = {"float32": 4, "bfloat16": 2, "int64": 8}[spec.dtype]
    for dim in spec.shape:
        count *= factors[dim] if isinstance(dim, str) else dim
    return count


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    """Plans of up to 20 launches; each reads some earlier values and writes a buffer, or views an earlier value."""
    names, buffers, launches = ["x"], {}, []
    for i in range(draw(st.integers(1, 20))):
        inputs = draw(st.lists(st.sampled_from(names), min_size=1, max_size=3))
        is_view = len(names) > 1 and draw(st.booleans())
        name = f"v{i}" if is_view else f"b{i}"
        launches.append(launch(inputs[:1] if is_view else inputs, name, "view" if is_view else "reference"))
        if not is_view:
            first = draw(st.sampled_from(["T", "R", 1, 3]))
            dtype = draw(st.sampled_from(["float32", "bfloat16", "int64"]))
            buffers[name] = TensorSpec((first, draw(st.integers(1, 40))), dtype)
        names.append(name)
    return plan_of(launches, buffers, draw(st.sampled_from(names[1:])))


def lifetimes(plan: Plan) -> dict[str, tuple[int, int]]:
    """First and last launch that needs each buffer, by walking views back to what they show."""
    shown: dict[str, str] = {}
    life: dict[str, tuple[int, int]] = {}
    for i, item in enumerate(plan.launches):
        for argument in item.args:
            buffer = shown.get(argument["v"], argument["v"])
            if buffer in life:
                life[buffer] = (life[buffer][0], i)
        (output,) = item.outputs
        assert output is not None
        if item.kind == "view":
            source = item.args[0]["v"]
            shown[output] = shown.get(source, source)
        else:
            life[output] = (i, i)
    last = shown.get(plan.outputs[0], plan.outputs[0])
    if last in life:
        life[last] = (life[last][0], len(plan.launches))
    return life


@given(plans(), st.integers(1, 64), st.integers(1, 8))
@settings(deadline=None, max_examples=200)
def test_no_two_live_buffers_overlap_and_the_arena_holds_all(plan: Plan, tokens: int, rows: int) -> None:
    arena = layout(plan, tokens, rows)
    life = lifetimes(plan)
    assert set(arena.offsets) == set(life) == set(plan.buffers)
    spans = {
        name: (start, start + size_bytes(plan.buffers[name], tokens, rows)) for name, start in arena.offsets.items()
    }
    for name, (start, end) in spans.items():
        assert start % ALIGNMENT == 0 and start >= 0 and end <= arena.num_bytes
        for other, (other_start, other_end) in spans.items():
            apart = end <= other_start or other_end <= start
            alive_together = life[name][0] <= life[other][1] and life[other][0] <= life[name][1]
            assert other == name or apart or not alive_together


def test_bytes_are_used_again_once_nobody_reads_them() -> None:
    spec = TensorSpec(("T", 16), "float32")
    chain = [launch(["x" if i == 0 else f"b{i - 1}"], f"b{i}") for i in range(10)]
    arena = layout(plan_of(chain, {f"b{i}": spec for i in range(10)}, "b9"), max_tokens=32, max_rows=1)
    assert arena.num_bytes == 2 * 32 * 16 * 4


def test_a_view_keeps_what_it_shows() -> None:
    spec = TensorSpec(("T", 16), "float32")
    launches = [launch(["x"], "a"), launch(["a"], "view", "view"), launch(["x"], "b"), launch(["view", "b"], "c")]
    arena = layout(plan_of(launches, dict.fromkeys("abc", spec), "c"), max_tokens=8, max_rows=1)
    assert len({arena.offsets[name] for name in "abc"}) == 3
