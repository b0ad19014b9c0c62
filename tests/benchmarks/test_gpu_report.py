"""What is made of the GPU suite's measurements: a traced step described, and results drawn. No GPU is needed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from benchmarks.plot_gpu import charts, kind_of
from benchmarks.timeline import Span, describe, parse_span, spans_of

RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results"
NORM, PRODUCT = f"gs_add_rms_norm_{'a' * 16}", "nvjet_tst_192x192_64x4_1x2_h_bz_coopB_TNT"


def trace(num_steps: int) -> dict[str, Any]:
    """Steps of 40 us with 2 us between kernels, 7 us apart; the third kernel begins before the second has ended."""
    step = [
        (0, 5, f"gs_step_prologue_{'0' * 16}"),
        (7, 10, NORM),
        (12, 11, PRODUCT),
        (25, 15, f"gs_step_epilogue_{'1' * 16}"),
    ]
    events = [
        {"cat": "kernel", "ts": 1000 + 47 * number + begin, "dur": duration, "name": name}
        for number in range(num_steps)
        for begin, duration, name in step
    ]
    return {"traceEvents": [{"cat": "cpu_op", "ts": 0, "dur": 9, "name": "aten::mm"}, *reversed(events)]}


def test_a_traced_step_has_its_spans_its_idle_time_and_the_gaps_around_it() -> None:
    row = describe(spans_of(trace(4)))
    assert (row["total_us"], row["idle_us"], row["between_steps_us"]) == (40, 4, [7, 7, 7])
    spans = [parse_span(text) for text in row["spans"]]
    assert spans[1:3] == [Span(7, 10, NORM), Span(12, 11, PRODUCT)] and len(spans) == 4


def test_a_trace_without_whole_steps_is_refused() -> None:
    with pytest.raises(ValueError, match="2 kernels step_prologue and 2 step_epilogue"):
        describe(spans_of(trace(2)))


def test_kernels_are_drawn_by_their_op() -> None:
    assert [kind_of(name) for name in (NORM, PRODUCT, "Memcpy HtoD (Pinned -> Device)")] == [
        "add_rms_norm", "library product", "copy",
    ]  # fmt: skip


def test_every_committed_result_is_drawn_as_committed() -> None:
    drawn = sorted(RESULTS.glob("gpu_*_decode.svg"))
    assert drawn
    for path in drawn:
        stem = path.stem.removesuffix("_decode")
        for name, svg in charts(json.loads((RESULTS / f"{stem}.json").read_text())).items():
            ElementTree.fromstring(svg)
            assert (RESULTS / f"{stem}_{name}.svg").read_text() == svg


def test_a_result_with_everything_has_every_chart() -> None:
    prefill = {"prompts": 1, "tokens_each": 4096, "ms": 80.0, "tflop_s": 700.0}
    prefill["by_op"] = {"linear": {"ms": 70.0, "tflop_s": 720.0}, "add_rms_norm": {"ms": 2.0}}
    sections: dict[str, Any] = {
        "environment": {"device": "a <device> & more"},
        "rates": {"read_gb_s": 4000, "bf16_mm_tflop_s": 800},
        "kernels": {"norm": {"ours": {"gb_s": 3e3}}, "attention": {"ours": {"tflop_s": 4e2}}, "other": {"error": "x"}},
        "decode": {"steps": [{"batch": 1, "context": 1024, "event_ms": 4.0, "gb_s": 4000.0}]},
        "prefill": {"bf16_mm_tflop_s": 800, "steps": [prefill]},
        "timeline": [{"batch": 1, "context": 1024, **describe(spans_of(trace(3)))}],
    }  # fmt: skip
    found = charts({"benchmark": "gpu_suite", **{name: {"result": value} for name, value in sections.items()}})
    assert list(found) == ["kernels_gb_s", "kernels_tflop_s", "decode", "prefill", "timeline_1"]
    for svg in found.values():
        ElementTree.fromstring(svg)
