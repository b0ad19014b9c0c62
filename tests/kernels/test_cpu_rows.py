"""Generated activation, embedding and gather kernels against their references."""

from __future__ import annotations

import torch
from cpu_kernel_cases import Case

from graphserve.kernels.activation import ACTIVATIONS

DTYPES = (torch.float32, torch.bfloat16)


def test_activation_kernels_equal_torch_over_their_whole_range(check_cases) -> None:
    cases = []
    for dtype in DTYPES:
        x = torch.cat((torch.linspace(-30, 30, 997), torch.tensor([-1e4, 1e4, 0.0]))).reshape(8, 125).to(dtype)
        for act in ACTIVATIONS:
            dynamic = {(0, 0): "T", ("out", 0): "T"}
            cases.append(Case(f"{act} {dtype}", "activation", {"act": act}, [x], dynamic, {"T": 8}))
    check_cases(cases, core=("gelu ", "silu"))


def test_gated_product_reads_column_slices_of_one_buffer(check_cases) -> None:
    cases = []
    for dtype in DTYPES:
        for rows, inner in ((1, 2048), (3, 37), (40, 512)):
            merged = torch.randn(1, rows, 2 * inner).to(dtype)
            gate, up = merged.chunk(2, dim=-1)
            dynamic = {(0, 1): "T", (1, 1): "T", ("out", 1): "T"}
            for act in ("silu", "gelu_tanh"):
                name = f"{act} {dtype} {rows}x{inner}"
                cases.append(Case(name, "act_mul", {"act": act}, [gate, up], dynamic, {"T": rows}))
    check_cases(cases, core=("gelu_tanh",))


def test_embedding_and_gather_kernels_copy_the_right_rows(check_cases) -> None:
    cases = []
    for dtype in DTYPES:
        table = torch.randn(50, 70).to(dtype)
        ids = torch.randint(0, 50, (1, 9))
        dynamic = {(0, 1): "T", ("out", 1): "T"}
        cases.append(Case(f"table {dtype}", "embedding", {}, [ids, table], dynamic, {"T": 9}))
        cases.append(
            Case(f"packed {dtype}", "embedding", {"packed": True}, [ids, table], dynamic, {"T": 9}, packed_table=True)
        )
        indices = torch.tensor([8, 0, 3])
        gathered = {(0, 1): "T", (1, 0): "R", ("out", 0): "R"}
        x = torch.randn(1, 9, 70).to(dtype)
        cases.append(Case(f"gather {dtype}", "gather_rows", {}, [x, indices], gathered, {"T": 9, "R": 3}))
    check_cases(cases, core=("packed", "gather"))
