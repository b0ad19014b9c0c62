"""Per-head norm, rotation and the write into the paged cache in one launch; rotation alone; cache write alone.

A program takes one token and some heads of one of q, k and v: the programs of a token are its blocks of query heads,
then of key heads, then of value heads.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable

from graphserve.kernels.arg_spec import ArgSpec, Call, Dim, Refused, require_unit_stride
from graphserve.kernels.triton.expressions import limited, quantized, round_to, stored_type
from graphserve.kernels.triton.head_rows import HeadColumns
from graphserve.kernels.triton.kernel import FLOAT_DTYPES, KernelText, TritonKernel, next_power_of_2, require_float

# Elements of one program, and its threads: eight elements, one 128-bit load, of each half of the rotated pairs. Where
# that is all there is to do (no norm, no scale), two loads a thread are faster (benchmarks/gpu_tune.py, H200).
_PROGRAM_ELEMENTS = 2048
_THREADS = 128
_PLAIN_THREADS = 64
_CACHE_DTYPES = (*FLOAT_DTYPES, "float8_e4m3fn")

_KV = ("kv_k", "kv_v", "slot_mapping")
_ROPE_KV = ("q", "k", "v", "cos", "sin", "positions", "q_norm", "k_norm", *_KV)
ARGUMENTS = {
    "kv_write": ("k", "v", *_KV),
    "kv_write_quant": ("k", "v", *_KV, "k_scale", "v_scale"),
    "rope_kv_write": _ROPE_KV,
    "rope_kv_write_quant": (*_ROPE_KV, "k_scale", "v_scale"),
}
_OPTIONAL = ("cos", "sin", "q_norm", "k_norm", "k_scale", "v_scale")


class _Branch:
    """Text of the programs that work on the heads of q, k or v; its variables start with that letter.

    Args:
        text: the kernel being written.
        name: ``q``, ``k`` or ``v``.
        spec: ``[T, heads, dim]``.
        columns: how a head is held.
    """

    def __init__(self, text: KernelText, name: str, spec: ArgSpec, columns: HeadColumns) -> None:
        self.text, self.name, self.spec, self.columns = text, name, spec, columns
        heads = spec.int_dim(1)
        # The members of an interleaved pair come in one load, so half as many elements are a load a thread; more spill.
        elements = _PROGRAM_ELEMENTS // (2 if columns.rotary and columns.style == "interleaved" else 1)
        self.height = max(1, min(next_power_of_2(heads), elements // next_power_of_2(columns.block)))
        self.programs = -(-heads // self.height)
        upper = name.upper()
        text.constants(**{f"{upper}_HEADS": heads, f"{upper}_ROWS": self.height, f"{upper}_PROGRAMS": self.programs})
        self.mask = f"{name}_head < {upper}_HEADS" if heads % self.height else ""

    def load(self, block: str) -> list[str]:
        """The heads of program ``block`` of this branch, each of their parts in fp32."""
        name, upper = self.name, self.name.upper()
        strides = {f"{upper}_TOKEN_STRIDE": self.spec.int_stride(0), f"{upper}_HEAD_STRIDE": self.spec.int_stride(1)}
        self.text.constants(**strides)
        return [
            f"{name}_head = ({block} * {upper}_ROWS + tl.arange(0, {upper}_ROWS))[:, None]",
            f"{name}_start = {name}_ptr + token * {upper}_TOKEN_STRIDE + {name}_head * {upper}_HEAD_STRIDE",
            *self.columns.load(name, f"{name}_start", self.mask, f"{upper}_ROWS"),
        ]

    def norm(self, weight: ArgSpec | None) -> list[str]:
        """RMSNorm of each head with ``weight [dim]``, rounded as :func:`graphserve.kernels.norm.rms_norm` rounds it."""
        if weight is None:
            return []
        name, call, dtype = self.name, self.text.call, self.spec.dtype
        self.text.constants(HEAD_DIM=self.columns.dim, EPS=float(call.attr("eps")))
        parts = self.columns.parts
        squares = [f"tl.sum({name}_{part} * {name}_{part}, axis=1, keep_dims=True)" for part in parts]
        lines = self.columns.load(f"{name}_norm", f"{name}_norm_ptr")
        lines.append(f"{name}_inverse = tl.rsqrt(({' + '.join(squares)}) / HEAD_DIM + EPS)")
        for part in parts:
            factor, value = f"{name}_norm_{part}", f"{name}_{part} * {name}_inverse"
            if call.attr("offset"):
                self.text.constants(OFFSET=float(call.attr("offset")))
                factor = f"({factor} + OFFSET)"
            if not call.attr("weight_fp32"):
                factor = round_to(weight.dtype, factor) if call.attr("offset") else factor
                value = round_to(dtype, value)
            lines.append(f"{name}_{part} = {round_to(dtype, f'{value} * {factor}')}")
        return lines

    def store(self, start: str, value: Callable[[str], str]) -> list[str]:
        """Write the parts to the heads at ``start``; ``value`` makes of a part's variable what is stored."""
        values = {part: value(f"{self.name}_{part}") for part in self.columns.parts}
        return self.columns.store(start, self.name, values, self.mask, f"{self.name.upper()}_ROWS")


def rope_kv_write(call: Call, target: str) -> TritonKernel:
    """Every op of :data:`ARGUMENTS`."""
    specs: dict[str, ArgSpec] = {}
    for i, name in enumerate(ARGUMENTS[call.op]):
        spec = call.optional(i) if name in _OPTIONAL else call.tensor(i, name)
        if spec is not None:
            specs[name] = spec
    _check(specs)
    text = KernelText(call)
    for i, name in enumerate(ARGUMENTS[call.op]):
        if name in specs and (name != "positions" or "cos" in specs):
            text.pointer(f"{name}_ptr", i, stored_type(specs[name], target))
    if "q" in specs:
        text.output("out_ptr", 0)

    rotary = specs["cos"].int_dim(-1) if "cos" in specs else 0
    columns = HeadColumns(specs["k"].int_dim(2), rotary, call.attrs.get("style", "half"))
    value_columns = HeadColumns(specs["v"].int_dim(2), 0, "half", prefix="value_")
    lines = ["token = tl.program_id(0).to(tl.int64)", "block = tl.program_id(1)", *columns.define(text)]
    if rotary:
        lines += _table_rows(text, columns, specs)
    branches = [_Branch(text, name, specs[name], columns) for name in ("q", "k") if name in specs]
    branches.append(_Branch(text, "v", specs["v"], value_columns))
    bodies = []
    for i, branch in enumerate(branches):
        before = " - ".join(["block", *(f"{b.name.upper()}_PROGRAMS" for b in branches[:i])])
        body = branch.load(f"({before})" if i else before)
        if branch.name == "v":
            body = [*value_columns.define(text), *body]
        else:
            body += [*branch.norm(specs.get(f"{branch.name}_norm")), *columns.rotate(branch.name)]
        bodies.append(body + (_store_queries(branch) if branch.name == "q" else _store_in_cache(branch, specs, target)))
    lines.append(_choose(branches, bodies))
    is_plain = rotary and columns.style == "half" and not {"q_norm", "k_scale"} & specs.keys()
    threads = _PLAIN_THREADS if is_plain else _THREADS
    grid = (specs["k"].shape[0], sum(b.programs for b in branches), 1)
    return text.build("\n".join(lines), grid, _num_warps(target, threads))


def rope(call: Call, target: str) -> TritonKernel:
    """``gs.rope``: rotation of ``[1, H, T, D]`` or ``[1, T, H, D]``; strides may depend on T."""
    x, cos, sin, out = call.tensor(0, "x"), call.tensor(1, "cos"), call.tensor(2, "sin"), call.outputs[0]
    require_float(("x", x), ("cos", cos), ("sin", sin), ("output", out))
    if len(x.shape) != 4 or x.shape[0] != 1:
        raise Refused(f"rope takes [1, H, T, D] or [1, T, H, D], got {x.shape}")
    for name, spec in (("x", x), ("cos", cos), ("sin", sin), ("output", out)):
        require_unit_stride(spec, name)
    token_axis, head_axis = (2, 1) if call.attr("heads_first") else (1, 2)
    text = KernelText(call)
    for i, name in enumerate(("x", "cos", "sin")):
        text.pointer(f"{name}_ptr", i)
    text.output("out_ptr", 0)
    columns = HeadColumns(x.int_dim(3), cos.int_dim(-1), call.attr("style"))
    heads = ArgSpec(x.dtype, (x.shape[token_axis], x.int_dim(head_axis), x.int_dim(3)))
    branch = _Branch(text, "x", heads, columns)
    starts = {}
    for name, spec in (("x", x), ("out", out)):
        token = _stride(text, f"{name.upper()}_TOKEN_STRIDE", spec.stride(token_axis))
        head = _stride(text, f"{name.upper()}_HEAD_STRIDE", spec.stride(head_axis))
        starts[name] = f"{name}_ptr + token * {token} + x_head * {head}"
    lines = [
        "token = tl.program_id(0).to(tl.int64)",
        *columns.define(text),
        *_table_rows(text, columns, {"cos": cos, "sin": sin}),
        "x_head = (tl.program_id(1) * X_ROWS + tl.arange(0, X_ROWS))[:, None].to(tl.int64)",
        *columns.load("x", starts["x"], branch.mask, "X_ROWS"),
        *columns.rotate("x"),
        *branch.store(starts["out"], lambda value: value),
    ]
    if any("T" in str(spec.stride(axis)) for spec in (x, out) for axis in (1, 2)):
        text.scalar("T")
    return text.build("\n".join(lines), (x.shape[token_axis], branch.programs, 1), _num_warps(target, _THREADS))


def _num_warps(target: str, threads: int) -> int:
    return threads // (64 if target.startswith("hip") else 32)


def _stride(text: KernelText, name: str, stride: Dim) -> str:
    """A constant, or the expression of a stride that depends on T."""
    if isinstance(stride, str):
        return f"({stride})"
    text.constants(**{name: stride})
    return name


def _table_rows(text: KernelText, columns: HeadColumns, specs: dict[str, ArgSpec]) -> list[str]:
    """The row of cos and sin for the token: by its position from a table, or its own where there are no positions."""
    lines = ["position = tl.load(positions_ptr + token)"] if "positions" in specs else []
    for name in ("cos", "sin"):
        text.constants(**{f"{name.upper()}_STRIDE": specs[name].int_stride(-2)})
        row = "position" if "positions" in specs else "token"
        lines += columns.load_table(name, f"{name}_ptr + {row} * {name.upper()}_STRIDE")
    return lines


def _store_queries(branch: _Branch) -> list[str]:
    branch.text.constants(OUT_HEAD_STRIDE=branch.columns.dim)
    start = "q_out = out_ptr + (token * Q_HEADS + q_head) * OUT_HEAD_STRIDE"
    return [start, *branch.store("q_out", lambda value: value)]


def _store_in_cache(branch: _Branch, specs: dict[str, ArgSpec], target: str) -> list[str]:
    name, upper, cache = branch.name, branch.name.upper(), specs[f"kv_{branch.name}"]
    strides = {f"CACHE_{upper}_{axis}_STRIDE": cache.int_stride(i) for i, axis in enumerate(("BLOCK", "HEAD", "TOKEN"))}
    branch.text.constants(BLOCK_SIZE=cache.int_dim(2), **strides)

    def stored(value: str) -> str:
        if cache.dtype == branch.spec.dtype:
            return value
        value = round_to(branch.spec.dtype, value)
        if cache.dtype in FLOAT_DTYPES:
            return value
        if f"{name}_scale" in specs:
            value = f"{value} / {name}_scale"
        return quantized(branch.text, limited(value, cache.dtype), cache.dtype, target)

    lines = [f"{name}_slot = tl.load(slot_mapping_ptr + token)"]
    if f"{name}_scale" in specs:
        lines.append(f"{name}_scale = tl.load({name}_scale_ptr)")
    place = f"({name}_slot // BLOCK_SIZE) * CACHE_{upper}_BLOCK_STRIDE + {name}_head * CACHE_{upper}_HEAD_STRIDE"
    place += f" + ({name}_slot % BLOCK_SIZE) * CACHE_{upper}_TOKEN_STRIDE"
    lines.append(f"{name}_cached = kv_{name}_ptr + {place}")
    return lines + branch.store(f"{name}_cached", stored)


def _choose(branches: list[_Branch], bodies: list[list[str]]) -> str:
    """One ``if`` over the blocks of a token."""
    lines, limit = [], ""
    for i, (branch, body) in enumerate(zip(branches, bodies, strict=True)):
        limit = f"{limit} + {branch.name.upper()}_PROGRAMS" if limit else f"{branch.name.upper()}_PROGRAMS"
        keyword = "else:" if i == len(branches) - 1 else f"{'elif' if i else 'if'} block < {limit}:"
        lines += [keyword, textwrap.indent("\n".join(body), "    ")]
    return "\n".join(lines)


def _check(specs: dict[str, ArgSpec]) -> None:
    k, v = specs["k"], specs["v"]
    require_float(*((name, specs.get(name)) for name in ("q", "k", "v", "cos", "sin", "q_norm", "k_norm")))
    for name, spec in specs.items():
        require_unit_stride(spec, name)
    for name in ("kv_k", "kv_v"):
        if specs[name].dtype not in _CACHE_DTYPES:
            raise Refused(f"{name} is {specs[name].dtype}: a cache is one of {', '.join(_CACHE_DTYPES)}")
    for name in ("slot_mapping", "positions"):
        if name in specs and specs[name].dtype != "int64":
            raise Refused(f"{name} must be int64, got {specs[name].dtype}")
    if ("cos" in specs) != ("sin" in specs):
        raise Refused("cos_table and sin_table must both be given or both be absent")
    if "q" in specs and specs["q"].int_dim(2) != k.int_dim(2):
        raise Refused(f"q and k heads differ: {specs['q'].shape[2]} and {k.shape[2]}")
    if k.int_dim(1) != v.int_dim(1):
        raise Refused(f"{k.shape[1]} key heads and {v.shape[1]} value heads: they must be equal")
