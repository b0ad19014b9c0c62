"""RMSNorm and LayerNorm with what stands around them: residual add, Gemma's norm before it, quantization after."""

from __future__ import annotations

from graphserve.kernels.arg_spec import ArgSpec, Call
from graphserve.kernels.triton.kernel import TL_DTYPES, KernelText, TritonKernel, require_float
from graphserve.kernels.triton.rows import RowProgram


def norm(call: Call, target: str) -> TritonKernel:
    """``rms_norm``, ``layer_norm``, ``add_rms_norm`` and ``add_layer_norm``."""
    adds = call.op.startswith("add_")
    is_rms = "rms_norm" in call.op
    x = call.tensor(0, "x")
    text = KernelText(call)
    program = RowProgram(text, x, x.int_dim(-1), target)
    lines = [program.head]
    text.pointer("x_ptr", 0)
    lines.append(f"x = {program.load('x_ptr', 'X', x)}.to(tl.float32)")
    if adds:
        lines += _add_residual(text, program, call.tensor(1, "residual"), 1, call.outputs[1])
    base = 2 if adds else 1
    weight, bias = call.optional(base), None if is_rms else call.optional(base + 1)
    require_float(("x", x), ("weight", weight), ("bias", bias))
    text.constants(EPS=float(call.attr("eps")))
    if is_rms:
        lines += rms_norm_lines(text, program, weight, base, "weight", x.dtype, call)
    else:
        lines += _layer_norm_lines(text, program, weight, bias, base)
    text.output("out_ptr", 0)
    if adds:
        text.output("total_ptr", 1)
        lines.insert(3, program.store("total_ptr", "TOTAL", call.outputs[1], "x"))
    lines.append(program.store("out_ptr", "OUT", call.outputs[0], "normed"))
    text.scalar(*program.scalars)
    return text.build("\n".join(lines), program.grid, program.num_warps)


def _add_residual(text: KernelText, program: RowProgram, residual: ArgSpec, index: int, total: ArgSpec) -> list[str]:
    require_float(("residual", residual))
    text.pointer("residual_ptr", index)
    load = program.load("residual_ptr", "RESIDUAL", residual)
    return [f"x = (x + {load}.to(tl.float32)).to({TL_DTYPES[total.dtype]}).to(tl.float32)"]


def rms_norm_lines(
    text: KernelText, program: RowProgram, weight: ArgSpec | None, index: int, name: str, dtype: str, call: Call
) -> list[str]:
    """Statements from ``x`` (fp32, 0 outside the row) to ``normed``; ``dtype`` is that of the tensor normed."""
    lines = ["normed = x * tl.rsqrt(tl.sum(x * x, axis=1, keep_dims=True) / D + EPS)"]
    if weight is None:
        return lines
    text.pointer(f"{name}_ptr", index)
    load, offset = program.load_columns(f"{name}_ptr"), float(call.attr("offset"))
    scale = f"{load}.to(tl.float32)"
    if offset:
        text.constants(OFFSET=offset)
        scale = f"({scale} + OFFSET)"
    if call.attr("weight_fp32"):
        return [*lines, f"normed = normed * {scale}"]
    if offset and weight.dtype != "float32":
        scale = f"{scale}.to({TL_DTYPES[weight.dtype]}).to(tl.float32)"
    rounded = "normed" if dtype == "float32" else f"normed.to({TL_DTYPES[dtype]}).to(tl.float32)"
    return [*lines, f"normed = {scale} * {rounded}"]


def _layer_norm_lines(
    text: KernelText, program: RowProgram, weight: ArgSpec | None, bias: ArgSpec | None, index: int
) -> list[str]:
    centred = "x - tl.sum(x, axis=1, keep_dims=True) / D"
    if program.is_masked:
        centred = f"tl.where(mask, {centred}, 0.0)"
    lines = [f"x = {centred}", "normed = x * tl.rsqrt(tl.sum(x * x, axis=1, keep_dims=True) / D + EPS)"]
    if weight is not None:
        text.pointer("weight_ptr", index)
        lines.append(f"normed = normed * {program.load_columns('weight_ptr')}.to(tl.float32)")
    if bias is not None:
        text.pointer("bias_ptr", index + 1)
        lines.append(f"normed = normed + {program.load_columns('bias_ptr')}.to(tl.float32)")
    return lines
