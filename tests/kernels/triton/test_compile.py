"""Text, grids, compiles without a GPU and the interpreter, on a kernel small enough to know by heart."""

from __future__ import annotations

import os
import subprocess
import sys

import msgspec
import pytest
import torch
from triton_kernel_cases import Case, _Guarded, assert_close

from graphserve.kernels.arg_spec import ArgSpec, Call, Refusal, Refused
from graphserve.kernels.triton import TARGETS, TritonKernel, evaluate, generate, grid_size
from graphserve.kernels.triton.compile import compile_for, interpret, load_jit
from graphserve.kernels.triton.kernel import KernelText

ROWS = ArgSpec("bfloat16", ("T", 4096))
WEIGHT = ArgSpec("bfloat16", (4096,))
NORM = {"eps": 1e-5, "offset": 0.0, "weight_fp32": False}


def norm_kernel(**changes: object) -> TritonKernel:
    kernel = generate("gs.rms_norm", {**NORM, **changes}, [ROWS, WEIGHT], [ROWS], "cuda:90")
    assert isinstance(kernel, TritonKernel), kernel
    return kernel


def doubling(alignment: int = 16) -> TritonKernel:
    """out = 2 * x over 1024 elements a program."""
    spec = ArgSpec("float32", ("T", 1024), alignment=alignment)
    text = KernelText(Call("double", {}, [spec], [spec]))
    text.pointer("x_ptr", 0)
    text.output("out_ptr", 0)
    text.constants(BLOCK=1024)
    body = """
    offset = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + offset, 2 * tl.load(x_ptr + offset))
    """
    return text.build(body, ("T", 1, 1), num_warps=4)


def test_equal_launches_share_a_key_and_any_attribute_changes_it() -> None:
    assert norm_kernel() == norm_kernel()
    assert norm_kernel().key != norm_kernel(eps=1e-6).key


def test_alignment_is_part_of_the_key_and_decides_vector_loads() -> None:
    aligned, unaligned = doubling(), doubling(alignment=4)
    assert aligned.key != unaligned.key
    assert compile_for(aligned, "cuda:90").num_vector_loads_128 == 2
    assert compile_for(unaligned, "cuda:90").num_vector_loads_128 == 0


def test_the_comment_block_names_generator_key_and_source_nodes() -> None:
    kernel = norm_kernel()
    text = kernel.source_for(["layers_0_mul", "layers_0_mul_1"])
    head = text.split("\n\n")[0]
    assert "kernel rms_norm" in head and kernel.key in head and "layers_0_mul, layers_0_mul_1" in head
    assert all(line.startswith("#") for line in head.splitlines())
    assert [line for line in text.splitlines() if line not in head] == [
        line for line in kernel.source.splitlines() if line not in head
    ]


def test_a_kernel_survives_json() -> None:
    kernel = norm_kernel()
    assert msgspec.json.decode(msgspec.json.encode(kernel), type=TritonKernel) == kernel


def test_generating_imports_neither_triton_nor_torch() -> None:
    code = (
        "import sys; from graphserve.kernels.triton import generate;"
        "from graphserve.kernels.arg_spec import ArgSpec as A;"
        f"k = generate('gs.rms_norm', {NORM!r}, [A('float32', ('T', 64)), None], [A('float32', ('T', 64))], 'cuda:80');"
        "assert k.source; bad = {'triton', 'torch'} & set(sys.modules); assert not bad, bad"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": os.getcwd()})


def test_an_unknown_target_is_an_error_and_an_unknown_op_a_refusal() -> None:
    with pytest.raises(ValueError, match="cuda:70.*cuda:80"):
        generate("gs.rms_norm", NORM, [ROWS, WEIGHT], [ROWS], "cuda:70")
    refusal = generate("gs.nothing", {}, [ROWS], [ROWS], "cuda:90")
    assert isinstance(refusal, Refusal) and "gs.nothing" in refusal.reason


def test_a_strided_last_dimension_is_refused_with_its_strides() -> None:
    strided = ArgSpec("bfloat16", ("T", 4096), (1, 4096))
    refusal = generate("gs.rms_norm", NORM, [strided, WEIGHT], [ROWS], "cuda:90")
    assert isinstance(refusal, Refusal) and "contiguous in its last dimension" in refusal.reason


def test_a_dtype_without_a_triton_type_is_refused() -> None:
    text = KernelText(Call("double", {}, [ArgSpec("complex64", (4,))], []))
    with pytest.raises(Refused, match="complex64"):
        text.pointer("x_ptr", 0)


@pytest.mark.parametrize(
    ("expression", "value"),
    [(7, 7), ("T", 33), ("cdiv(T*32, 16)", 66), ("cdiv(T, 16) + S", 8), ("min(T, 4) * max(R, 2)", 8), ("B_1//2-1", 4)],
)
def test_grid_expressions_have_their_values(expression: int | str, value: int) -> None:
    assert evaluate(expression, {"T": 33, "S": 5, "R": 1, "B_1": 10}) == value


@pytest.mark.parametrize("expression", ["T.x", "T if S else R", "open('f', 'r')", "X", "T / 2", "1 <", "True", "T, S"])
def test_other_expressions_are_errors(expression: str) -> None:
    with pytest.raises(ValueError, match="not an expression"):
        evaluate(expression, {"T": 1, "S": 1, "R": 1})


def test_a_missing_scalar_is_named() -> None:
    with pytest.raises(ValueError, match="needs the step scalar B_0; given: T"):
        grid_size(("T", "B_0", 1), {"T": 1})


@pytest.mark.parametrize(
    "target", ["cuda:90", *(pytest.param(t, marks=pytest.mark.full) for t in TARGETS if "90" not in t)]
)
def test_every_target_compiles_without_a_device(target: str) -> None:
    compiled = compile_for(doubling(), target)
    assert compiled.num_vector_loads_128 == compiled.num_vector_stores_128 > 0
    assert compiled.num_spills == compiled.num_mma == compiled.shared_bytes == 0
    assert 0 < compiled.num_registers < 64
    assert compiled.name in compiled.asm and compiled.binary[:4] == b"\x7fELF"


def test_a_second_compile_reads_the_first_one(monkeypatch: pytest.MonkeyPatch) -> None:
    first = compile_for(doubling(), "cuda:90")
    monkeypatch.setattr("graphserve.kernels.triton.compile._compile", lambda *_: pytest.fail("compiled again"))
    assert compile_for(doubling(), "cuda:90") == first


def test_the_interpreter_leaves_the_compiler_working() -> None:
    x, out = torch.randn(3, 1024), torch.empty(3, 1024)
    interpret(doubling(), [x, out], {"T": 3})
    assert torch.equal(out, 2 * x)
    spec = ArgSpec("float32", ("T", 160))
    compiled = compile_for(generate("gs.rms_norm", NORM, [spec, None], [spec], "cuda:90"), "cuda:90")
    assert compiled.num_registers > 0
    interpret(doubling(), [x, out.zero_()], {"T": 2})
    assert torch.equal(out[:2], 2 * x[:2]) and not out[2].any()


def test_a_grid_of_no_programs_runs_nothing() -> None:
    out = torch.ones(1, 1024)
    interpret(doubling(), [torch.zeros(1, 1024), out], {"T": 0})
    assert out.all()


def test_the_jit_function_is_named_by_its_symbol() -> None:
    assert load_jit(doubling()).__name__ == doubling().symbol


def test_the_comparison_sees_a_wrong_value_a_wrong_dtype_and_a_write_beside_the_output() -> None:
    x = torch.randn(4, 8)
    wrong = x.clone()
    wrong[2, 3] += 1e-3
    for bad in (wrong, x.half(), x[:3]):
        with pytest.raises(AssertionError):
            assert_close(bad, x)
    guarded = _Guarded(x)
    guarded.check()
    guarded._memory[3] = 0
    with pytest.raises(AssertionError, match="beside"):
        guarded.check()


def test_a_case_fails_where_the_kernel_is_wrong() -> None:
    def wrong_reference(x: torch.Tensor, weight: None, **_: object) -> torch.Tensor:
        return x

    case = Case("wrong", "rms_norm", NORM, [torch.randn(2, 64), None], reference=wrong_reference)
    with pytest.raises(AssertionError):
        case.check()
