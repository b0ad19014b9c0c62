"""RMSNorm and LayerNorm with what stands around them: residual add, Gemma's norm before it, quantization after."""

from __future__ import annotations

from graphserve.kernels.arg_spec import ArgSpec, Call
from graphserve.kernels.triton.expressions import round_to, stored_type
from graphserve.kernels.triton.kernel import KernelText, TritonKernel, require_float
from graphserve.kernels.triton.quantized_rows import QuantizedRows
from graphserve.kernels.triton.rows import RowProgram

# Tensor arguments and results of each op, in order.
ARGUMENTS = {
    "rms_norm": ("x", "weight"),
    "add_rms_norm": ("x", "residual", "weight"),
    "layer_norm": ("x", "weight", "bias"),
    "add_layer_norm": ("x", "residual", "weight", "bias"),
    "norm_add": ("x", "post_weight", "residual"),
    "norm_add_rms_norm": ("x", "post_weight", "residual", "weight"),
    "rms_norm_quant": ("x", "weight"),
    "add_rms_norm_quant": ("x", "residual", "weight"),
}
RESULTS = {
    "rms_norm": ("out",),
    "add_rms_norm": ("out", "total"),
    "layer_norm": ("out",),
    "add_layer_norm": ("out", "total"),
    "norm_add": ("total",),
    "norm_add_rms_norm": ("out", "total"),
    "rms_norm_quant": ("quantized", "scale"),
    "add_rms_norm_quant": ("quantized", "scale", "total"),
}


def norm(call: Call, target: str) -> TritonKernel:
    """Every op of :data:`ARGUMENTS`: a program reads whole rows once, and writes each result once."""
    text = KernelText(call)
    x = call.tensor(0, "x")
    program = RowProgram(text, x, x.int_dim(-1), target)
    specs: dict[str, ArgSpec] = {}
    for index, name in enumerate(ARGUMENTS[call.op]):
        if text.pointer(f"{name}_ptr", index):
            specs[name] = call.tensor(index, name)
    require_float(*specs.items())
    for index, name in enumerate(RESULTS[call.op]):
        specs[name] = call.outputs[index]
        text.output(f"{name}_ptr", index, stored_type(specs[name], target))
    text.scalar(*program.scalars)

    # Everything is loaded before the first reduction, whose barrier no load can pass.
    lines = [program.head, f"x = {program.load('x_ptr', 'X', x)}.to(tl.float32)"]
    if "residual" in specs:
        lines.append(f"residual = {program.load('residual_ptr', 'RESIDUAL', specs['residual'])}.to(tl.float32)")
    for name in ("post_weight", "weight", "bias"):
        if name in specs:
            lines.append(f"{name} = {_scale(text, program, name, specs[name])}")
    if call.op.startswith("norm_add"):
        text.constants(POST_EPS=float(call.attr("post_eps" if call.op == "norm_add_rms_norm" else "eps")))
        lines += _rms_norm(text, specs, "post_weight", "POST_EPS", x.dtype)
        lines.append(f"x = {round_to(x.dtype, 'normed')}")
    if "residual" in specs:
        lines.append(f"x = {round_to(specs['total'].dtype, 'residual + x')}")
        lines.append(program.store("total_ptr", "TOTAL", specs["total"], "x"))
    if call.op != "norm_add":
        text.constants(EPS=float(call.attr("eps")))
        is_layer_norm = "layer_norm" in call.op
        lines += _layer_norm(program, specs) if is_layer_norm else _rms_norm(text, specs, "weight", "EPS", x.dtype)
    if "quantized" in specs:
        lines += QuantizedRows(text, program, specs["quantized"], target).whole(round_to(x.dtype, "normed"))
    elif "out" in specs:
        lines.append(program.store("out_ptr", "OUT", specs["out"], "normed"))
    return text.build("\n".join(lines), program.grid, program.num_warps)


def _scale(text: KernelText, program: RowProgram, name: str, spec: ArgSpec) -> str:
    """A weight or bias in fp32, with the offset added and rounded as the op rounds it."""
    value = f"{program.load_columns(f'{name}_ptr')}.to(tl.float32)"
    offset = 0.0 if "layer_norm" in text.call.op else float(text.call.attr("offset"))
    if not offset:
        return value
    text.constants(OFFSET=offset)
    return f"{value} + OFFSET" if text.call.attr("weight_fp32") else round_to(spec.dtype, f"{value} + OFFSET")


def _rms_norm(text: KernelText, specs: dict[str, ArgSpec], weight: str, eps: str, dtype: str) -> list[str]:
    """From ``x`` (fp32, 0 outside the row) to ``normed``; ``dtype`` is that of the tensor normed."""
    lines = [f"normed = x * tl.rsqrt(tl.sum(x * x, axis=1, keep_dims=True) / D + {eps})"]
    if weight in specs:
        factor = "normed" if text.call.attr("weight_fp32") else round_to(dtype, "normed")
        lines.append(f"normed = {factor} * {weight}")
    return lines


def _layer_norm(program: RowProgram, specs: dict[str, ArgSpec]) -> list[str]:
    centred = "x - tl.sum(x, axis=1, keep_dims=True) / D"
    lines = [
        f"x = tl.where(mask, {centred}, 0.0)" if program.is_masked else f"x = {centred}",
        "normed = x * tl.rsqrt(tl.sum(x * x, axis=1, keep_dims=True) / D + EPS)",
    ]
    if "weight" in specs:
        lines.append("normed = normed * weight")
    if "bias" in specs:
        lines.append("normed = normed + bias")
    return lines
