"""``graphserve explain``: what each pass did with a model, and the plan that came out."""

from __future__ import annotations

from collections import Counter, defaultdict
from typing import Any

import msgspec
import torch

from graphserve.compiler.build import BuildResult
from graphserve.config import EngineConfig
from graphserve.plan.schema import Launch
from graphserve.runtime.cpp_backend import lower_to_cpp
from graphserve.runtime.kv_cache import KVCache
from graphserve.runtime.load import build_meta, compile_model, find_model

_SHOWN_REFUSALS = 5  # per pass and reason


def run_explain(model: str, json: bool = False, config_only: bool = False) -> str:
    """Compile ``model`` without weights and describe the result.

    Args:
        model: folder, hub id or ``demo``.
        json: one JSON document instead of text.
        config_only: ``model`` need hold no more than its config.json.

    Raises:
        GraphserveError: there is no such model, or it is refused; the reason is the message.
    """
    from graphserve.compiler.capture import register_interfaces

    register_interfaces()
    config = EngineConfig.from_kwargs(model=model)
    folder = find_config_folder(model) if config_only else find_model(config)
    meta, max_model_len = build_meta(config, folder, None)
    built = compile_model(meta, max_model_len)
    report = describe(built, config.block_size)
    return msgspec.json.format(msgspec.json.encode(report), indent=1).decode() if json else as_text(report)


def find_config_folder(model: str) -> Any:
    """The folder with a model's config.json alone."""
    from graphserve.models.hub import resolve_config

    return resolve_config(model)


def describe(built: BuildResult, block_size: int = 16) -> dict[str, Any]:
    """The report as plain data.

    Keys: ``model``, ``layers`` (types and how many of each), ``passes`` (name, tier, matches, matches per layer,
    refusals), ``launches_per_layer`` (maximum over layers), ``launches`` (by kind and op), ``leftovers`` (launches that
    have no generated kernel, with the reason), ``cache_groups``, ``weight_bytes``, ``kv_bytes_per_token``, ``notes``.
    """
    plan = built.plan
    kernel_plan = lower_to_cpp(plan, KVCache(plan, 2, block_size, torch.device("meta")))
    launches = [x for x in kernel_plan.plan.launches if x.kind != "view"]
    per_layer = Counter(x.layer for x in launches if x.layer is not None)
    types = Counter(built.stack.types) if built.stack is not None else Counter()
    leftovers: dict[tuple[str, str], list[int | None]] = defaultdict(list)
    for index, reason in kernel_plan.refusals.items():
        launch = plan.launches[index]
        leftovers[launch.op, reason].append(launch.layer)
    return {
        "model": plan.model,
        "layers": {"count": plan.model["num_layers"], "types": [types[t] for t in sorted(types)],
                   "traced": list(built.stack.traced) if built.stack is not None else None},
        "seconds": {name: round(value, 3) for name, value in built.seconds.items()},
        "passes": [_describe_pass(report) for report in plan.passes],
        "launches_per_layer": max(per_layer.values(), default=len(launches)),
        "launches": dict(Counter(f"{x.kind} {x.op}" for x in launches)),
        "layer_launches": [_describe_launch(x) for x in launches if x.layer == 0],
        "leftovers": [{"op": op, "reason": reason, "count": len(at)} for (op, reason), at in leftovers.items()],
        "cache_groups": [
            {"layers": len(g.layers), "window": g.window, "chunk": g.chunk} for g in plan.cache_groups
        ],
        "weight_bytes": sum(_num_bytes(w.spec.shape, w.spec.dtype) for w in plan.weights.values()),
        "kv_bytes_per_token": sum(s.bytes_per_token for s in plan.cache_layers if s.shared_with is None),
        "notes": built.notes,
    }  # fmt: skip


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


def _describe_launch(launch: Launch) -> dict[str, Any]:
    return {
        "op": launch.op,
        "kind": launch.kind,
        "kernel": launch.kernel,
        "reads": [a["v"] for a in launch.args if isinstance(a, dict) and "v" in a],
        "writes": [o for o in launch.outputs if o is not None],
        "sources": list(launch.sources),
    }


def as_text(report: dict[str, Any]) -> str:
    """The report for a reader."""
    model, layers = report["model"], report["layers"]
    lines = [
        f"{model['architecture']} ({model['model_type']}): {layers['count']} layers of {len(layers['types'])} "
        f"type(s), dtype {model['dtype']}, max_model_len {model['max_model_len']}",
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
    lines += ["", f"launches per layer: {report['launches_per_layer']}; layer 0:"]
    for launch in report["layer_launches"]:
        lines.append(f"  {launch['kind']:<10}{launch['op'].removesuffix('.default'):<22}{', '.join(launch['reads'])}")
    lines += [
        "",
        "launches without a generated kernel" if report["leftovers"] else "every launch has a generated kernel",
    ]
    for left in report["leftovers"]:
        lines.append(f"  {left['count']:>4} x {left['op']}: {left['reason']}")
    lines += ["", "cache groups"]
    for group in report["cache_groups"]:
        rule = (
            f"window {group['window']}" if group["window"] else f"chunk {group['chunk']}" if group["chunk"] else "full"
        )
        lines.append(f"  {group['layers']} layers, {rule}")
    total = sum(report["seconds"].values())
    lines += ["", f"compiled in {total:.1f} s: " + ", ".join(f"{k} {v:.2f} s" for k, v in report["seconds"].items())]
    return "\n".join(lines)
