"""Generated matrix kernels over packed weights against torch."""

from __future__ import annotations

import pytest
import torch
from cpu_kernel_cases import Case

from graphserve.kernels.cpu import pack_linear_weight, unpack_linear_weight

DTYPES = (torch.float32, torch.bfloat16)
ROW_COUNTS = (1, 2, 3, 5, 6, 7, 13, 32, 129)  # every register block, and blocks of unequal height


def _cases(dtype: torch.dtype) -> list[Case]:
    torch.manual_seed(1)
    cases = []
    for out, inner, biased in ((128, 96, False), (75, 33, True), (1, 2048, False)):
        weight = (torch.randn(out, inner) * inner**-0.5).to(dtype)
        bias = torch.randn(out).to(dtype) if biased else None
        for rows in ROW_COUNTS:
            x = torch.randn(rows, inner).to(dtype)
            dynamic = {(0, 0): "T", ("out", 0): "T"}
            name = f"{dtype}-{rows}-{out}x{inner}"
            cases.append(Case(name, "linear", {}, [x, weight, bias], dynamic, {"T": rows}))
    # x is a column slice of a wider buffer
    x = torch.randn(4, 200).to(dtype)[:, 50:146]
    weight = (torch.randn(40, 96) * 0.1).to(dtype)
    cases.append(Case(f"{dtype}-slice", "linear", {}, [x, weight, None], {(0, 0): "T", ("out", 0): "T"}, {"T": 4}))
    return cases


def test_linear_kernels_equal_torch_at_every_isa_level(check_cases) -> None:
    check_cases([case for dtype in DTYPES for case in _cases(dtype)], core=("",))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (16, 2), (17, 33), (64, 48)])
def test_unpacking_a_packed_weight_gives_it_back(dtype: torch.dtype, rows: int, columns: int) -> None:
    weight = torch.randn(rows, columns).to(dtype)
    assert torch.equal(unpack_linear_weight(pack_linear_weight(weight), rows, columns), weight)


def test_packing_refuses_a_dtype_without_a_kernel() -> None:
    with pytest.raises(ValueError, match="float64 cannot be packed"):
        pack_linear_weight(torch.zeros(16, 16, dtype=torch.float64))
