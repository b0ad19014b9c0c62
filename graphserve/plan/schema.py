"""The launch plan: everything a device needs to run a model, in a readable JSON form.

A plan is a flat list of launches over named values. A value is one of

* a step input (``input_ids``, ``positions``, ``logits_indices``, ``query_start_loc``, ``seq_lens``,
  ``block_table.G`` and ``slot_mapping.G`` for cache group ``G``), or, for a module that is no language model, one of
  ``inputs``,
* a weight (``weights[name]``: how it is made from the checkpoint's parameters, see :class:`WeightSpec`),
* a KV cache (``kv.L``, one a cache layer), or
* a buffer written by an earlier launch.

Shapes hold ints and strings; a string is an affine expression in ``T`` (tokens of the step, padding included) and
``R`` (rows whose logits are wanted), for example ``"T"`` or ``"4*T"``. Nothing else varies from step to step.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec

PLAN_VERSION = 2

Dim = int | str
LaunchKind = Literal["reference", "library", "cpp", "triton", "inductor", "view"]


class TensorSpec(msgspec.Struct, frozen=True):
    """Shape and dtype of one value. ``stride`` is None for contiguous."""

    shape: tuple[Dim, ...]
    dtype: str  # "float32", "bfloat16", "int64", ...


class Launch(msgspec.Struct, frozen=True):
    """One step of the plan.

    ``op`` is ``gs.<name>`` or ``aten.<name>.<overload>``. ``args`` and ``kwargs`` are JSON values in which
    ``{"v": name}`` stands for a value, ``{"s": "expr"}`` for an integer expression in T and R, ``{"dtype": name}``,
    ``{"device": true}`` (the plan's device), ``{"layout"/"memory_format": name}``. ``outputs`` names one buffer per
    result (``None`` for a result nobody reads). ``kind == "view"``: no work at run time, the output aliases its input.
    """

    op: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outputs: tuple[str | None, ...]
    kind: LaunchKind = "reference"
    layer: int | None = None
    sources: tuple[str, ...] = ()  # names of the captured nodes it stands for
    kernel: str | None = None  # key of the generated kernel, for kind "cpp" and "triton"


class WeightPart(msgspec.Struct, frozen=True):
    """A parameter of the model (named as `transformers` names it), or its transpose, as a part of a weight."""

    parameter: str
    size: int  # along the weight's ``dim``
    is_transposed: bool = False


class WeightSpec(msgspec.Struct, frozen=True):
    """One weight of the plan and how it is made.

    ``source``: ``parameters`` (its ``parts``, joined along ``dim``), ``constant`` (a constant or non-persistent buffer,
    stored beside the plan under the weight's own name) or ``init`` (written by ``Plan.init``).
    """

    spec: TensorSpec
    source: Literal["parameters", "constant", "init"]
    parts: tuple[WeightPart, ...] = ()
    dim: int = 0


class CacheSpec(msgspec.Struct, frozen=True):
    """What one attention layer keeps per token, and which tokens it still needs.

    ``window``: a query at position i sees keys j with ``i - j < window``. ``chunk``: keys with ``j // chunk == i //
    chunk``. ``shared_with``: index of the cache layer whose KV this layer reads instead of writing its own.
    """

    kv_heads: int
    k_dim: int
    v_dim: int
    dtype: str
    window: int | None = None
    chunk: int | None = None
    shared_with: int | None = None

    @property
    def bytes_per_token(self) -> int:
        size = {"float32": 4, "bfloat16": 2, "float16": 2}[self.dtype]
        return self.kv_heads * (self.k_dim + self.v_dim) * size


class CacheGroup(msgspec.Struct, frozen=True):
    """Cache layers that share one block table per request (same window and chunk)."""

    layers: tuple[int, ...]  # indices into Plan.cache_layers
    window: int | None = None
    chunk: int | None = None


class Plan(msgspec.Struct):
    """A compiled model. Invariant: launches only read values defined before them."""

    model: dict[str, Any]  # architecture, vocab_size, max_model_len, dtype, num_layers, ...
    launches: list[Launch]
    init: list[Launch]  # run once at load: position tables and the like; ``positions`` is arange(max_model_len)
    buffers: dict[str, TensorSpec]
    weights: dict[str, WeightSpec]
    cache_layers: list[CacheSpec]
    cache_groups: list[CacheGroup]
    outputs: tuple[str, ...]  # of a language model: the logits alone, [R, vocab]
    passes: list[dict[str, Any]]  # report of the pipeline: name, matches, refusals, seconds
    inputs: dict[str, TensorSpec] = {}  # beside the step inputs of a language model, or all of any other module
    version: int = PLAN_VERSION
