"""``torch.compile(module, backend="graphserve")``: eager results, generated kernels, what is refused or left eager."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import threading
import tomllib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

from graphserve.compiler.backend import MAX_SHAPES, CompiledGraph, graphserve_backend
from graphserve.errors import UnsupportedModelError
from graphserve.kernels.cpu import compiler
from graphserve.runtime.kv_cache import KVCache
from graphserve.runtime.triton_plan import lower_to_triton

needs_compiler = pytest.mark.skipif(compiler() is None, reason="needs a C++ compiler")


class Compiled:
    """A compiled function and the graphs that the backend made of it."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.graphs: list[Any] = []

        def backend(gm: fx.GraphModule, example_inputs: list[Any]) -> Any:
            self.graphs.append(graphserve_backend(gm, example_inputs))
            return self.graphs[-1]

        self.call = torch.compile(function, backend=backend)

    @property
    def runners(self) -> list[Any]:
        assert all(isinstance(graph, CompiledGraph) for graph in self.graphs)
        return [runner for graph in self.graphs for runner in graph.runners.values()]

    def ops(self, kind: str) -> Counter[str]:
        launches = [launch for runner in self.runners for launch in runner.plan.launches]
        return Counter(launch.op.split(".")[1] for launch in launches if launch.kind == kind)


class MLP(nn.Module):
    """Pre-norm gated MLP with its residual, written as models write it."""

    def __init__(self, width: int = 64, inner: int = 96) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width))
        self.gate = nn.Linear(width, inner, bias=False)
        self.up = nn.Linear(width, inner, bias=False)
        self.down = nn.Linear(inner, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = x.float()
        normed = self.weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)
        return x + self.down(F.silu(self.gate(normed)) * self.up(normed))


class Block(nn.Module):
    """A transformer block."""

    def __init__(self, width: int = 64, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # [B, T, width] → the same
        batch, tokens, width = x.shape
        split = self.qkv(self.norm1(x)).view(batch, tokens, 3, self.heads, width // self.heads)
        q, k, v = split.permute(2, 0, 3, 1, 4).unbind(0)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, tokens, width))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    torch.manual_seed(0)
    torch._dynamo.reset()
    with torch.no_grad():
        yield
    torch._dynamo.reset()


def assert_close(ours: torch.Tensor, eager: torch.Tensor) -> None:
    tolerance = 1e-5 if eager.dtype == torch.float32 else 2e-2
    scale = max(1.0, float(eager.abs().max()))
    torch.testing.assert_close(ours, eager, rtol=0, atol=tolerance * scale)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", [MLP, Block])
def test_a_module_gives_its_eager_results_at_every_length(kind: type[nn.Module], dtype: torch.dtype) -> None:
    module = kind().eval().to(dtype)
    compiled = Compiled(module)
    for tokens in (5, 9, 33):
        x = torch.randn(2, tokens, 64, dtype=dtype)
        result = compiled.call(x)
        assert_close(result, module(x))
        assert result.dtype == dtype
    assert len(compiled.runners) == 2  # the first length, then one plan for all lengths


@needs_compiler
def test_generated_kernels_take_the_norms_and_activations_and_nothing_is_lost() -> None:
    compiled = Compiled(nn.Sequential(MLP(), MLP(), nn.RMSNorm(64)).eval())
    for tokens in (3, 5):
        compiled.call(torch.randn(2, tokens, 64))
    assert compiled.ops("cpp") == Counter(rms_norm=2, act_mul=4, add_rms_norm=4)
    assert compiled.ops("library") == Counter(linear=12)
    assert not compiled.ops("reference")


def test_a_call_without_a_kernel_runs_as_the_aten_call_it_is() -> None:
    module = Block().eval()
    compiled = Compiled(module)
    x = torch.randn(1, 6, 64)
    assert_close(compiled.call(x), module(x))
    assert compiled.ops("reference")["scaled_dot_product_attention"] == 1


def test_several_results_keyword_arguments_and_sizes_come_back_in_their_places() -> None:
    def two(x: torch.Tensor, *, scale: torch.Tensor) -> Any:
        normed = F.rms_norm(x, (8,))
        return {"scaled": normed * scale, "turned": (normed + 1).t(), "rows": x.shape[0], "none": None}

    compiled = Compiled(two)
    for rows in (2, 5, 7):
        x, scale = torch.randn(rows, 8), torch.randn(8)
        ours, eager = compiled.call(x, scale=scale), two(x, scale=scale)
        assert_close(ours["scaled"], eager["scaled"])
        assert_close(ours["turned"], eager["turned"])
        assert ours["turned"].stride() == eager["turned"].stride()
        assert (ours["rows"], ours["none"]) == (rows, None)
    assert all(runner is not None for runner in compiled.runners)


def test_sizes_that_vary_independently_get_a_plan_for_each_combination() -> None:
    module = nn.RMSNorm(64).eval()
    compiled = Compiled(module)
    shapes = [(2, 3), (4, 5), (6, 7), (4, 5)]
    for batch, tokens in shapes:
        x = torch.randn(batch, tokens, 64)
        assert_close(compiled.call(x), module(x))
    assert len(compiled.runners) == len(set(shapes)) < MAX_SHAPES


def test_a_parameter_updated_between_calls_is_seen() -> None:
    module = MLP().eval()
    compiled = Compiled(module)
    x = torch.randn(2, 5, 64)
    before = compiled.call(x)
    module.gate.weight.mul_(3)
    module.weight.add_(1)
    assert_close(compiled.call(x), module(x))
    module.down.weight.data = torch.randn_like(module.down.weight)  # other memory
    module.weight.data = torch.randn_like(module.weight)
    after = compiled.call(x)
    assert_close(after, module(x))
    assert not torch.allclose(before, after)
    assert len(compiled.runners) == 1


def test_a_result_is_not_overwritten_by_the_next_call() -> None:
    module = MLP().eval()
    compiled = Compiled(module)
    x, y = torch.randn(2, 5, 64), torch.randn(2, 5, 64)
    first = compiled.call(x)
    kept = first.clone()
    compiled.call(y)
    assert torch.equal(first, kept)


def test_arguments_may_be_strided_views_and_lie_elsewhere_at_each_call() -> None:
    module = MLP().eval()
    compiled = Compiled(module)
    held = []  # so that no two arguments share an address
    for _ in range(3):
        x = torch.randn(64, 5, 2).permute(2, 1, 0)
        held.append(x)
        assert_close(compiled.call(x), module(x))
    assert len(compiled.runners) == 1


def test_a_module_compiled_in_inference_mode_runs_outside_it_too() -> None:
    module = MLP().eval()
    compiled = Compiled(module)
    x = torch.randn(2, 5, 64)
    with torch.inference_mode():
        assert_close(compiled.call(x), module(x))
    assert_close(compiled.call(x), module(x))
    with torch.inference_mode():
        y = torch.randn(2, 7, 64)
        assert_close(compiled.call(y), module(y))


def test_calls_from_several_threads_do_not_mix() -> None:
    module = MLP().eval()
    compiled = Compiled(module)
    inputs = [torch.randn(1, 8, 64) for _ in range(4)]
    expected = [module(x) for x in inputs]
    compiled.call(inputs[0])
    wrong = []

    def work(index: int) -> None:
        with torch.no_grad():
            for _ in range(20):
                if not torch.allclose(compiled.call(inputs[index]), expected[index], atol=1e-5):
                    wrong.append(index)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def write_into_argument(x: torch.Tensor) -> torch.Tensor:
    x.add_(1)
    return x * 2


def update_statistics(x: torch.Tensor) -> torch.Tensor:
    return F.batch_norm(x, x.mean(0) * 0, x.var(0) * 0 + 1, training=True)


def view_of_argument(x: torch.Tensor) -> torch.Tensor:
    return x[:2]


def two_views(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    y = x * 2
    return y, y[:1]


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (write_into_argument, "writes into an argument"),
        (update_statistics, "updates running statistics"),
        (view_of_argument, "shares memory with an argument"),
        (two_views, "shares memory with an argument or another result"),
    ],
)
def test_what_a_plan_would_get_wrong_runs_eagerly_with_the_reason(
    function: Callable[..., Any], reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    ours, eager = torch.randn(3, 4), torch.empty(3, 4)
    eager.copy_(ours)
    with caplog.at_level(logging.WARNING, "graphserve"):
        result = Compiled(function).call(ours)
    expected = function(eager)
    assert torch.equal(ours, eager)  # what was written into the argument
    results, truths = (torch.utils._pytree.tree_leaves(values) for values in (result, expected))
    for mine, theirs in zip(results, truths, strict=True):
        assert_close(mine, theirs)
    assert reason in caplog.text


def test_running_statistics_given_as_arguments_are_updated() -> None:
    def step(x: torch.Tensor, mean: torch.Tensor, var: torch.Tensor) -> torch.Tensor:
        return F.batch_norm(x, mean, var, training=True)

    x, mean, var = torch.randn(6, 4) + 3, torch.zeros(4), torch.ones(4)
    Compiled(step).call(x, mean, var)
    assert_close(mean, 0.1 * x.mean(0))


def test_a_view_of_an_argument_still_shows_the_argument() -> None:
    x = torch.zeros(3)
    Compiled(view_of_argument).call(x).add_(1)
    assert x.tolist() == [1, 1, 0]


def test_autocast_keeps_its_choice_of_dtypes() -> None:
    module = nn.Linear(8, 8).eval()
    with torch.autocast("cpu", torch.bfloat16):
        x = torch.randn(2, 8)
        ours = Compiled(module).call(x)
        assert ours.dtype == torch.bfloat16 and torch.equal(ours, module(x))


def test_dropout_in_training_mode_is_drawn_anew_at_each_call() -> None:
    compiled = Compiled(nn.Dropout(0.5).train())
    x = torch.ones(64)
    first, second = compiled.call(x), compiled.call(x)
    assert set(first.tolist()) == {0.0, 2.0} and not torch.equal(first, second)


def test_an_index_out_of_range_is_an_error_as_in_eager() -> None:
    def gather(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        return torch.index_select(x, 1, index) + 1

    compiled = Compiled(gather)
    x = torch.randn(2, 4, 8)
    index = torch.tensor([3, 0])
    assert torch.equal(compiled.call(x, index), gather(x, index))
    with pytest.raises((IndexError, RuntimeError), match=r"out of .*(range|bounds)"):
        compiled.call(x, torch.tensor([99, 0]))


def test_training_is_refused_and_says_what_to_do() -> None:
    compiled = Compiled(MLP())
    x = torch.randn(1, 3, 64)
    with torch.enable_grad(), pytest.raises(UnsupportedModelError, match=r"inference only.*torch\.no_grad\(\)"):
        compiled.call(x)


def test_a_function_that_switches_gradients_off_itself_is_compiled() -> None:
    module = MLP().eval()

    def predict(x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return module(x) * 2

    compiled = Compiled(predict)
    x = torch.randn(1, 3, 64)
    with torch.enable_grad():
        assert_close(compiled.call(x), predict(x))
    assert compiled.runners[0] is not None


PROGRAM = """
import torch, torch.nn as nn
import graphserve, sys
assert "torch._dynamo" not in sys.modules
module = nn.Sequential(nn.RMSNorm(16), nn.Linear(16, 16)).eval()
compiled = torch.compile(module, backend="graphserve")
with torch.inference_mode():
    x = torch.randn(2, 16)
    assert torch.allclose(compiled(x), module(x), atol=1e-5)
assert "graphserve.runtime.module_runner" in sys.modules
"""


def test_the_installed_distribution_gives_the_backend_its_name(tmp_path: Path, repository: Path) -> None:
    project = tomllib.loads((repository / "pyproject.toml").read_text())["project"]
    entries = project["entry-points"]["torch_dynamo_backends"]
    info = tmp_path / "graphserve-0.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: graphserve\nVersion: 0.0\n")
    lines = ["[torch_dynamo_backends]", *(f"{name} = {target}" for name, target in entries.items())]
    (info / "entry_points.txt").write_text("\n".join(lines) + "\n")
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{repository}"}
    result = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_on_a_gpu_only_attention_would_be_an_eager_call_of_a_block() -> None:
    compiled = Compiled(Block().eval())
    for tokens in (5, 7):
        compiled.call(torch.randn(2, tokens, 64))
    for runner in compiled.runners:
        plan = runner.module_plan.plan
        lowered = lower_to_triton(plan, KVCache(plan, 1, 1, torch.device("meta")), "cuda:90")
        eager = [launch.op for launch in lowered.plan.launches if launch.kind == "reference"]
        assert eager == ["aten.scaled_dot_product_attention.default"], lowered.refusals
