"""What each launch must move and compute, from the plan alone, and the time no device can beat.

Bytes count each tensor once: what a launch reads and writes if nothing stays in caches between launches. Keys and
values count by the context, weights of experts by the experts that a batch can reach.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import msgspec

from graphserve.errors import ConfigError
from graphserve.kernels.arg_spec import ITEM_SIZES, ArgSpec
from graphserve.plan.arena import launch_inputs
from graphserve.plan.schema import CacheSpec, Launch, Plan
from graphserve.runtime.kv_cache import KVCache
from graphserve.runtime.launch_specs import op_name, value_name, value_specs


class Device(msgspec.Struct, frozen=True):
    """Limits of a device, from its maker's data sheet: bytes and dense bf16 multiply-add operations a second."""

    name: str
    bytes_per_s: float
    flops_per_s: float


DEVICES = {
    "a100": Device("A100 80 GB SXM (data sheet)", 2.039e12, 312e12),
    "h100": Device("H100 SXM (data sheet)", 3.35e12, 989e12),
    "h200": Device("H200 SXM (data sheet)", 4.8e12, 989e12),
    "b200": Device("B200 (data sheet)", 8.0e12, 2250e12),
    "mi300x": Device("MI300X (data sheet)", 5.3e12, 1307e12),
}


class Step(msgspec.Struct, frozen=True):
    """A decode step: ``batch`` requests of ``context`` tokens each, one new token for each."""

    batch: int
    context: int


class Cost(msgspec.Struct, frozen=True):
    """Bytes moved and floating-point operations of one launch."""

    num_bytes: int
    num_flops: int

    def seconds(self, device: Device) -> float:
        """The larger of the two limits."""
        return max(self.num_bytes / device.bytes_per_s, self.num_flops / device.flops_per_s)


def device_named(name: str) -> Device:
    """A device of the table.

    Raises:
        ConfigError: the name is not in it.
    """
    if name not in DEVICES:
        raise ConfigError(f"device {name!r} is not known: one of {', '.join(DEVICES)}")
    return DEVICES[name]


def launch_costs(plan: Plan, kv_cache: KVCache, step: Step) -> list[Cost | None]:
    """Cost of each launch of ``plan`` in a decode step; None for views."""
    specs = value_specs(plan, kv_cache)
    return [None if launch.kind == "view" else _cost(launch, plan, specs, step) for launch in plan.launches]


def _cost(launch: Launch, plan: Plan, specs: dict[str, ArgSpec], step: Step) -> Cost:
    op = op_name(launch)
    names = dict.fromkeys((*launch_inputs(launch), *(n for n in launch.outputs if n is not None)))
    tables = {value_name(launch.args[i]) for i in _gathered_tables(op)}
    plain = [n for n in names if not n.startswith(("kv_k.", "kv_v.", "block_table.")) and n not in tables]
    num_bytes = sum(_tensor_bytes(specs[n], step) for n in plain if n in specs)
    num_bytes += sum(_gathered_bytes(specs[n], step) for n in tables if n in specs)
    num_flops = 0
    if op == "linear":
        rows = _count(specs[value_name(launch.args[0])].shape[:-1], step)
        num_flops = 2 * rows * _count(specs[value_name(launch.args[1])].shape, step)
    elif op == "moe":
        return _moe_cost(launch, specs, step, num_bytes)
    elif op in ("paged_attention", "rope_kv_write", "kv_write"):
        spec = plan.cache_layers[_cache_layer(names)]
        tokens = step.batch * (_visible(spec, step) if op == "paged_attention" else 1)
        num_bytes += tokens * spec.bytes_per_token
        if op == "paged_attention":
            heads = specs[value_name(launch.args[0])].shape[1]
            num_flops = 2 * tokens * int(heads) * (spec.k_dim + spec.v_dim)
    return Cost(num_bytes, num_flops)


def _gathered_tables(op: str) -> tuple[int, ...]:
    """Positions of arguments of which only one row a token is read."""
    return {"embedding": (1,), "rope_kv_write": (3, 4), "gather_rows": (0,)}.get(op, ())


def _moe_cost(launch: Launch, specs: dict[str, ArgSpec], step: Step, num_bytes: int) -> Cost:
    ids = specs[value_name(launch.args[1])]
    pairs = _count(ids.shape, step)
    up, down = specs[value_name(launch.args[3])], specs[value_name(launch.args[5])]
    experts = int(up.shape[0])
    # Rows choose freely: the expected number of experts that at least one of them reaches.
    reached = experts * (1 - (1 - 1 / experts) ** pairs)
    weights = sum(_tensor_bytes(spec, step) for spec in (up, down))
    per_pair = sum(_count(spec.shape[1:], step) for spec in (up, down))
    return Cost(round(num_bytes - weights * (1 - reached / experts)), 2 * pairs * per_pair)


def _cache_layer(names: Iterable[str]) -> int:
    return next(int(n.split(".")[1]) for n in names if n.startswith("kv_k."))


def _visible(spec: CacheSpec, step: Step) -> int:
    """Keys that the last token of a request sees."""
    if spec.window is not None:
        return min(spec.window, step.context)
    if spec.chunk is not None:
        return (step.context - 1) % spec.chunk + 1
    return step.context


def _count(shape: Iterable[int | str], step: Step) -> int:
    return math.prod(_size(d, step) for d in shape)


def _size(dim: int | str, step: Step) -> int:
    if isinstance(dim, int):
        return dim
    factor, _, _ = dim.rpartition("*")
    if dim.endswith("+1"):
        return step.batch + 1
    return int(factor or 1) * step.batch  # T, R and S are all the batch in a decode step


def _tensor_bytes(spec: ArgSpec, step: Step) -> int:
    return _count(spec.shape, step) * ITEM_SIZES[spec.dtype]


def _gathered_bytes(spec: ArgSpec, step: Step) -> int:
    width = spec.shape[-1]
    assert isinstance(width, int)
    return step.batch * width * ITEM_SIZES[spec.dtype]
