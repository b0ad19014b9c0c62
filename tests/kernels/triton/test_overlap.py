"""Kernels that start early: what they wait for stands before everything they read and write."""

import re

import msgspec
import pytest
import torch

pytest.importorskip("triton")

from graphserve.errors import ConfigError  # noqa: E402
from graphserve.kernels.triton.compile import compile_for  # noqa: E402
from graphserve.kernels.triton.overlap import MAX_OVERLAP_TOKENS, overlapping  # noqa: E402
from graphserve.runtime.kv_cache import KVCache  # noqa: E402
from graphserve.runtime.triton_plan import TritonPlan, lower_to_triton  # noqa: E402
from tests.compiler.compiled import compiled  # noqa: E402
from tests.runtime.stub_step import StubStep  # noqa: E402
from tests.tiny_models import tiny_config  # noqa: E402

CPU = torch.device("cpu")
MEMORY = re.compile(r"^\s+(?:@\S+ )?(?:ld|st|atom|red|cp)\.\S*", re.MULTILINE)
OWN_MEMORY = re.compile(r"\s+(?:@\S+ )?(?:ld\.param|(?:ld|st)\.shared)\b")
SASS_MEMORY = re.compile(r"\b(?:LDG|STG|LDGSTS|ATOMG|REDG|UBLKCP)\b")


def tiny_plan(name="llama", dtype=torch.float32):
    config = tiny_config(name)
    config.num_hidden_layers = 1
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[-1:]
    return compiled(config, dtype=dtype), config


def lowered(name="llama", target="cuda:90", **options) -> TritonPlan:
    plan = tiny_plan(name, torch.bfloat16)[0].plan
    return lower_to_triton(plan, KVCache(plan, 2, 16, torch.device("meta")), target, **options)


def check_order(kernel, target):
    built = compile_for(kernel, target)
    body = built.asm[built.asm.index(".entry") :]
    # The launch's own parameters and the block's own shared memory are not memory that another kernel wrote.
    accesses = [m.start() for m in MEMORY.finditer(body) if not OWN_MEMORY.match(m.group())]
    wait, launch = body.index("griddepcontrol.wait"), body.index("griddepcontrol.launch_dependents")
    assert accesses and wait < launch < min(accesses), kernel.symbol
    assert built.sass.index("ACQBULK") < SASS_MEMORY.search(built.sass).start(), kernel.symbol


def test_every_kernel_of_a_plan_waits_before_it_touches_memory():
    for kernel in lowered(overlap=True).distinct_kernels().values():
        check_order(kernel, "cuda:90")


@pytest.mark.full
@pytest.mark.parametrize("target", ["cuda:90", "cuda:100"])
@pytest.mark.parametrize("name", ["llama", "gemma3_text", "qwen3_moe", "gpt_oss"])
def test_every_kernel_waits_on_every_target(name, target):
    for kernel in lowered(name, target, overlap=True).distinct_kernels().values():
        check_order(kernel, target)


def test_a_kernel_that_waits_is_another_kernel_with_the_same_launch():
    for kernel in lowered().distinct_kernels().values():
        waiting = overlapping(kernel)
        assert waiting.key != kernel.key and waiting.symbol != kernel.symbol
        same = msgspec.structs.replace(waiting, key=kernel.key, symbol=kernel.symbol, source=kernel.source)
        assert same == kernel
        assert kernel.key not in waiting.source and kernel.symbol not in waiting.source
        assert waiting.source.count("gdc_wait()") == 1 and overlapping(kernel) == waiting


def test_without_the_option_nothing_waits():
    assert not any("gdc_" in kernel.source for kernel in lowered().distinct_kernels().values())


def test_targets_without_early_starts_refuse_them():
    for target in ("cuda:80", "hip:gfx942"):
        with pytest.raises(ConfigError, match=f"overlapping launches on {target}: only cuda:90, cuda:100 have them"):
            lowered(target=target, overlap=True)


@pytest.mark.parametrize("overlap", [True, pytest.param(False, marks=pytest.mark.full)])
def test_launches_of_small_steps_have_the_attribute_where_it_is_wanted(overlap):
    step = StubStep(*tiny_plan(), overlap=overlap)
    step.run(MAX_OVERLAP_TOKENS)
    assert {tuple(launch["attributes"]) for launch in step.launches} == {((6, 1),) if overlap else ()}
    before = len(step.launches)
    step.run(2 * MAX_OVERLAP_TOKENS)
    assert {tuple(launch["attributes"]) for launch in step.launches[before:]} == {()}
