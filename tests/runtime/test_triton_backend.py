"""Triton kernels behind a plan, bound against a stand-in for the CUDA driver: no GPU is needed."""

import pytest

from graphserve.errors import DeviceError
from graphserve.runtime.triton_backend import target_of
from graphserve.runtime.triton_plan import decode_segments
from tests.compiler.compiled import compiled_tiny
from tests.runtime.stub_step import StubStep
from tests.tiny_models import tiny_config


@pytest.mark.parametrize(
    ("capability", "target"), [((8, 0), "cuda:80"), ((8, 9), "cuda:80"), ((9, 0), "cuda:90"), ((10, 3), "cuda:100")]
)
def test_a_device_gets_the_target_of_its_major_version(capability: tuple[int, int], target: str) -> None:
    assert target_of(capability) == target


def test_a_device_without_a_target_is_refused_by_name() -> None:
    with pytest.raises(DeviceError, match=r"7\.5 is not served: kernels exist for 8\.x, 9\.x, 10\.x"):
        target_of((7, 5))


@pytest.mark.full
@pytest.mark.parametrize("num_seqs", [1, 4, 16])
def test_a_decode_step_is_exactly_the_plans_launches_with_the_plans_addresses(num_seqs: int) -> None:
    """Products of one row are ours, of more the library's; attention has its forms for decode steps."""
    built = compiled_tiny("llama")
    step = StubStep(built, tiny_config("llama"))
    lowered = step.lowered
    assert not lowered.refusals, "a launch would run eagerly"
    step.run(num_seqs)
    segments = decode_segments(num_seqs * built.plan.cache_layers[0].kv_heads)
    expected = [
        kernel.symbol
        for index, kernels in lowered.kernels.items()
        if not lowered.is_library_product(lowered.plan.launches[index], num_seqs)
        for kernel in (lowered.decode_kernels[index][segments] if index in lowered.decode_kernels else kernels)
    ]
    assert [launch["kernel"] for launch in step.launches] == expected
    step.run(num_seqs)
    first, second = step.launches[: len(expected)], step.launches[len(expected) :]
    assert first == second, "a bound step repeats itself to the address"
