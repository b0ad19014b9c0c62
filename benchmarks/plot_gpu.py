"""Draws a result of the GPU suite: SVG files beside it.

    python -m benchmarks.plot_gpu benchmarks/results/gpu_nvidia-h200_2026-11-20.json

Charts, each if the result has what it shows: kernels by GB/s and by TFLOP/s beside the library's call and the device's
measured rate, decode steps by GB/s, prefill by kind of launch, and a timeline of each decode step that was traced.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

from benchmarks.svg import bar_chart, strips
from benchmarks.timeline import parse_span

_GENERATED = re.compile(r"^gs_(\w+?)_[0-9a-f]{16}")  # kernels are named by op and key


def charts(document: dict[str, Any]) -> dict[str, str]:
    """Name → SVG of everything that the result holds."""
    sections = {name: part["result"] for name, part in document.items() if isinstance(part, dict) and "result" in part}
    if "rates" not in sections:
        raise SystemExit("the result has no section rates, beside which the others are drawn")
    device = sections.get("environment", {}).get("device", "unknown device")
    rates = sections["rates"]
    found: dict[str, str] = {}
    limits = {"gb_s": ("read_gb_s", "a read"), "tflop_s": ("bf16_mm_tflop_s", "a bf16 product")}
    for key, (rate, name) in limits.items():
        rows = _kernel_rows(sections.get("kernels", {}), key)
        if rows:
            title = f"Kernels on one {device}: generated (blue) and the library's (grey)"
            unit = {"gb_s": "GB/s", "tflop_s": "TFLOP/s"}[key]
            found[f"kernels_{key}"] = bar_chart(title, rows, unit, rates[rate], name)
    if steps := [step for step in sections.get("decode", {}).get("steps", []) if "gb_s" in step]:
        rows = {f"{s['batch']} x {s['context']}: {s['event_ms']:.2f} ms": [("step", s["gb_s"])] for s in steps}
        title = f"Decode steps of an 8B Llama shape in bf16 on one {device}"
        found["decode"] = bar_chart(title, rows, "GB/s", rates["read_gb_s"], "a read")
    if steps := sections.get("prefill", {}).get("steps", []):
        rows = {}
        for step in steps:
            what = f"{step['prompts']} x {step['tokens_each']}"
            rows[f"{what}, whole step: {step['ms']:.1f} ms"] = [("step", step["tflop_s"])]
            rows |= {
                f"{what}, {op}: {row['ms']:.1f} ms": [(op, row["tflop_s"])]
                for op, row in step["by_op"].items()
                if "tflop_s" in row
            }
        title = f"Prefill of an 8B Llama shape in bf16 on one {device}"
        found["prefill"] = bar_chart(title, rows, "TFLOP/s", sections["prefill"]["bf16_mm_tflop_s"], "a bf16 product")
    for traced in sections.get("timeline", []):
        title = (
            f"One decode step, {traced['batch']} x {traced['context']} tokens, 8B Llama shape, one {device}: "
            f"{traced['total_us']:,.0f} us, idle {traced['idle_us']:,.0f} us"
        )
        spans = [parse_span(text) for text in traced["spans"]]
        named = [(span.begin, span.duration, span.name, kind_of(span.name)) for span in spans]
        found[f"timeline_{traced['batch']}"] = strips(title, named)
    return found


def kind_of(kernel: str) -> str:
    """The op of a generated kernel; others are the library's."""
    match = _GENERATED.match(kernel)
    if match:
        return match.group(1)
    return "copy" if kernel.lower().startswith("mem") else "library product"


def _kernel_rows(kernels: dict[str, Any], key: str) -> dict[str, list[tuple[str, float]]]:
    rows = {}
    for name, row in kernels.items():
        bars = [(who, row[who][key]) for who in ("ours", "library") if key in row.get(who, {})]
        if bars:
            rows[name] = bars
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("result", type=Path, help="a file that benchmarks.gpu_suite wrote")
    args = parser.parse_args()
    for name, svg in charts(json.loads(args.result.read_text())).items():
        path = args.result.with_name(f"{args.result.stem}_{name}.svg")
        path.write_text(svg)
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
