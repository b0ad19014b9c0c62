"""``graphserve explain``: what each pass did with a model, and the plan that came out."""

from __future__ import annotations

from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import msgspec
import torch

from graphserve.compiler.build import BuildResult
from graphserve.compiler.roofline import DEVICES, Cost, Device, Step, device_named, launch_costs
from graphserve.config import EngineConfig
from graphserve.errors import ConfigError
from graphserve.kernels.triton.kernel import TARGETS
from graphserve.models.hub import resolve_config
from graphserve.plan.arena import launch_inputs
from graphserve.plan.schema import Launch, Plan
from graphserve.runtime.cpp_backend import KernelPlan, lower_to_cpp
from graphserve.runtime.find_plan import build_meta, compile_model
from graphserve.runtime.kv_cache import KVCache
from graphserve.runtime.load import find_model
from graphserve.runtime.triton_plan import TritonPlan, lower_to_triton

DEFAULT_STEP = Step(batch=1, context=1024)
_SHOWN_REFUSALS = 5  # per pass and reason


def run_explain(
    model: str,
    json: bool = False,
    config_only: bool = False,
    target: str = "cpu",
    device: str = "h200",
    batch: int = 1,
    context: int = 1024,
    dump_dir: Path | None = None,
    verify: bool = False,
) -> str:
    """Compile ``model`` and describe the result.

    Args:
        model: folder, hub id or ``demo``.
        json: one JSON document instead of text.
        config_only: ``model`` need hold no more than its config.json.
        target: ``cpu``, or a GPU such as ``cuda:90`` (which need not be there).
        device: whose limits the roofline of a GPU target takes; one of ``roofline.DEVICES``.
        batch, context: the decode step that bytes and operations are counted for.
        dump_dir: graphs before and after each pass and the source of each kernel are written here.
        verify: run the graph after every pass against eager `transformers` (reads the weights).

    Raises:
        GraphserveError: there is no such model, or it is refused; the reason is the message.
    """
    from graphserve.compiler.capture import register_interfaces

    register_interfaces()
    config = EngineConfig.from_kwargs(model=model)
    folder = resolve_config(model) if config_only else find_model(config)
    meta, max_model_len = build_meta(config, folder, None)
    built = compile_model(meta, max_model_len, dump_dir)
    report = describe(built, config.block_size, target, Step(batch, context), device_named(device), dump_dir)
    if verify:
        from graphserve.compiler.verify import verify_checkpoint

        report["verification"] = msgspec.to_builtins(verify_checkpoint(folder))
    return msgspec.json.format(msgspec.json.encode(report), indent=1).decode() if json else as_text(report)


def describe(
    built: BuildResult,
    block_size: int = 16,
    target: str = "cpu",
    step: Step = DEFAULT_STEP,
    device: Device = DEVICES["h200"],
    dump_dir: Path | None = None,
) -> dict[str, Any]:
    """The report as plain data.

    Keys: ``model``, ``target``, ``layers`` (types and how many of each), ``passes`` (name, tier, matches, matches per
    layer, refusals), ``launches_per_layer`` (maximum over layers; on a GPU each kernel counts, a reduce after split
    keys does not), ``launches`` (by kind and op), ``launch_lists`` (each launch of the first layer of each type, and
    under layer None those outside of layers), ``leftovers`` (launches that run eagerly, with the reason), ``step``
    (bytes, operations and, for a GPU, the least time of a decode step), ``cache_groups``, ``weight_bytes``,
    ``kv_bytes_per_token``, ``notes``.
    """
    plan = built.plan
    cache = KVCache(plan, 2, block_size, torch.device("meta"))
    lowered, sources = _lower_for(plan, cache, target)
    costs = launch_costs(plan, cache, step)
    indexed = [(i, x) for i, x in enumerate(lowered.plan.launches) if x.kind != "view"]
    per_layer = _launches_per_layer(lowered)
    described = [(x.layer, _describe_launch(x, costs[i], _num_kernels(lowered, i), target, device)) for i, x in indexed]
    types = Counter(built.stack.types) if built.stack is not None else Counter()
    leftovers: dict[tuple[str, str], int] = Counter()
    for index, reason in lowered.refusals.items():
        leftovers[plan.launches[index].op, reason] += 1
    if dump_dir is not None:
        for name, source in sources.items():
            (dump_dir / name).write_text(source, encoding="utf-8")
    return {
        "model": plan.model,
        "target": target,
        "layers": {
            "count": plan.model["num_layers"],
            "types": [types[t] for t in sorted(types)],
            "traced": list(built.stack.traced) if built.stack is not None else None,
        },
        "seconds": {name: round(value, 3) for name, value in built.seconds.items()},
        "passes": [_describe_pass(report) for report in plan.passes],
        "launches_per_layer": max(per_layer.values(), default=len(indexed)),
        "launches": dict(Counter(f"{x.kind} {x.op}" for _, x in indexed)),
        "launch_lists": [
            {"layer": layer, "launches": [launch for at, launch in described if at == layer]}
            for layer in (*_first_of_each_type(built), None)
        ],
        "leftovers": [{"op": op, "reason": reason, "count": count} for (op, reason), count in leftovers.items()],
        "num_kernels": len(sources),
        "step": _describe_step([c for c in costs if c is not None], step, target, device),
        "cache_groups": [{"layers": len(g.layers), "window": g.window, "chunk": g.chunk} for g in plan.cache_groups],
        "weight_bytes": sum(_num_bytes(w.spec.shape, w.spec.dtype) for w in plan.weights.values()),
        "kv_bytes_per_token": sum(s.bytes_per_token for s in plan.cache_layers if s.shared_with is None),
        "notes": built.notes,
    }


def _lower_for(plan: Plan, cache: KVCache, target: str) -> tuple[KernelPlan | TritonPlan, dict[str, str]]:
    """The plan lowered for a target, and the source of each distinct kernel by file name."""
    if target == "cpu":
        cpp = lower_to_cpp(plan, cache)
        return cpp, {f"{k.symbol}.cpp": k.source for k in cpp.kernels.values()}
    if target not in TARGETS:
        raise ConfigError(f"target {target!r} is not known: one of cpu, {', '.join(TARGETS)}")
    gpu = lower_to_triton(plan, cache, target)
    return gpu, {f"{k.symbol}.py": k.source for k in gpu.distinct_kernels().values()}


def _describe_step(costs: list[Cost], step: Step, target: str, device: Device) -> dict[str, Any]:
    total = Cost(sum(c.num_bytes for c in costs), sum(c.num_flops for c in costs))
    described: dict[str, Any] = {
        "batch": step.batch, "context": step.context, "bytes": total.num_bytes, "flops": total.num_flops
    }  # fmt: skip
    if target != "cpu":
        described["device"] = device.name
        described["least_ms"] = round(sum(c.seconds(device) for c in costs) * 1e3, 4)
    return described


def _num_bytes(shape: tuple[int | str, ...], dtype: str) -> int:
    count = getattr(torch, dtype).itemsize
    for dim in shape:
        count *= int(dim)
    return int(count)


def _describe_pass(report: dict[str, Any]) -> dict[str, Any]:
    refusals: dict[str, list[str]] = defaultdict(list)
    for refusal in report["refusals"]:
        refusals[refusal["reason"]].append(refusal["module"] or refusal["node"])
    per_layer = Counter(site["layer"] for site in report["sites"] if site["layer"] is not None)
    return {
        "name": report["name"],
        "tier": report["tier"],
        "matches": report["matches"],
        "matches_per_layer": {str(layer): per_layer[layer] for layer in sorted(per_layer)},
        "refusals": [{"reason": reason, "at": at} for reason, at in refusals.items()],
        "seconds": round(report["seconds"], 4),
    }


def _launches_per_layer(lowered: KernelPlan | TritonPlan) -> dict[int, int]:
    if isinstance(lowered, TritonPlan):
        return lowered.launches_per_layer()
    return dict(Counter(x.layer for x in lowered.plan.launches if x.kind != "view" and x.layer is not None))


def _num_kernels(lowered: KernelPlan | TritonPlan, index: int) -> int:
    """Kernels that one launch starts."""
    return len(lowered.kernels.get(index, [None])) if isinstance(lowered, TritonPlan) else 1


def _first_of_each_type(built: BuildResult) -> list[int]:
    if built.stack is None:
        return sorted({x.layer for x in built.plan.launches if x.layer is not None})[:1]
    types = built.stack.types
    return [types.index(t) for t in dict.fromkeys(types)]


def _describe_launch(
    launch: Launch, cost: Cost | None, num_kernels: int, target: str, device: Device
) -> dict[str, Any]:
    assert cost is not None
    limit = {} if target == "cpu" else {"least_us": round(cost.seconds(device) * 1e6, 3)}
    return {
        "bytes": cost.num_bytes,
        "flops": cost.num_flops,
        **limit,
        "op": launch.op,
        "kind": launch.kind,
        "kernel": launch.kernel,
        "num_kernels": num_kernels,
        "reads": list(launch_inputs(launch)),
        "writes": [o for o in launch.outputs if o is not None],
        "sources": list(launch.sources),
    }


def as_text(report: dict[str, Any]) -> str:
    """The report for a reader."""
    model, layers = report["model"], report["layers"]
    lines = [
        f"{model['architecture']} ({model['model_type']}): {layers['count']} layers of {len(layers['types'])} "
        f"type(s), dtype {model['dtype']}, max_model_len {model['max_model_len']}, target {report['target']}",
        f"weights {report['weight_bytes'] / 2**20:,.0f} MiB, KV cache {report['kv_bytes_per_token']:,} bytes a token",
    ]
    if layers["traced"] is not None:
        lines.append(f"traced layers {', '.join(map(str, layers['traced']))}; the others are repetitions of them")
    lines += [f"note: {note}" for note in report["notes"]]
    lines += ["", "passes, in order", f"  {'pass':<24}{'tier':<13}{'matches':>8}  refused"]
    for item in report["passes"]:
        refused = sum(len(r["at"]) for r in item["refusals"])
        lines.append(f"  {item['name']:<24}{item['tier']:<13}{item['matches']:>8}  {refused or ''}")
        for refusal in item["refusals"]:
            at = refusal["at"]
            more = f" and {len(at) - _SHOWN_REFUSALS} more" if len(at) > _SHOWN_REFUSALS else ""
            lines.append(f"      {refusal['reason']}")
            lines.append(f"        at {', '.join(at[:_SHOWN_REFUSALS])}{more}")
    lines += ["", f"launches per layer: at most {report['launches_per_layer']}"]
    for item in report["launch_lists"]:
        lines.append("outside of layers" if item["layer"] is None else f"layer {item['layer']}")
        lines.append(f"  {'kind':<10}{'op':<24}{'kernels':>7}{'KiB':>10}{'MFLOP':>10}{'least us':>10}  reads")
        lines += map(_launch_line, item["launches"])
    step = report["step"]
    least = f"; at the limits of {step['device']} at least {step['least_ms']} ms" if "device" in step else ""
    lines.append(
        f"decode step, batch {step['batch']}, context {step['context']}: {step['bytes'] / 2**20:,.1f} MiB, "
        f"{step['flops'] / 1e9:,.2f} GFLOP{least}"
    )
    lines.append(f"{report['num_kernels']} distinct kernels")
    lines += ["", "launches that run eagerly" if report["leftovers"] else "no launch runs eagerly"]
    for left in report["leftovers"]:
        lines.append(f"  {left['count']:>4} x {left['op']}: {left['reason']}")
    lines += ["", "cache groups"]
    for group in report["cache_groups"]:
        rule = (
            f"window {group['window']}" if group["window"] else f"chunk {group['chunk']}" if group["chunk"] else "full"
        )
        lines.append(f"  {group['layers']} layers, {rule}")
    lines += _verification_lines(report.get("verification"))
    total = sum(report["seconds"].values())
    lines += ["", f"compiled in {total:.1f} s: " + ", ".join(f"{k} {v:.2f} s" for k, v in report["seconds"].items())]
    return "\n".join(lines)


def _launch_line(launch: dict[str, Any]) -> str:
    least = f"{launch['least_us']:,.2f}" if "least_us" in launch else ""
    size = f"{launch['num_kernels']:>7}{launch['bytes'] / 1024:>10,.0f}{launch['flops'] / 1e6:>10,.1f}{least:>10}"
    return f"  {launch['kind']:<10}{launch['op'].removesuffix('.default'):<24}{size}  {', '.join(launch['reads'])}"


def _verification_lines(verification: dict[str, Any] | None) -> list[str]:
    if verification is None:
        return []
    lines = [
        "",
        "logits after each pass, float32",
        f"  {'pass':<24}{'changed by':>12}{'allowed':>10}{'from eager':>12}",
    ]
    for stage in verification["stages"]:
        mark = "" if stage["change"] <= stage["allowed"] else "  DEPARTS"
        lines.append(
            f"  {stage['name']:<24}{stage['change']:>12.1e}{stage['allowed']:>10.0e}{stage['error']:>12.1e}{mark}"
        )
    departs = verification["first_departure"]
    return [*lines, f"first departure: {departs}" if departs else "every pass keeps the logits"]
