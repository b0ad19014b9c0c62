"""Everything in this folder needs a CUDA device and is skipped, with the reason, where there is none.

Nothing heavy is imported when the folder is collected.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    import torch

    from tests.gpu.device_kernels import DeviceKernels


@pytest.fixture(scope="session", autouse=True)
def device() -> torch.device:
    """The CUDA device; every test of the folder is skipped where torch sees none. fp32 products stay fp32."""
    import torch

    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device: torch.cuda.is_available() is false")
    torch.set_float32_matmul_precision("highest")  # no TF32 in the reference's products and in library launches
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
    return torch.device("cuda", torch.cuda.current_device())


@pytest.fixture(scope="session")
def kernels(device: torch.device) -> DeviceKernels:
    """Compiles and launches generated kernels on the device."""
    from tests.gpu.device_kernels import DeviceKernels

    return DeviceKernels(device)
