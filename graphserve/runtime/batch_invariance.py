"""Batch invariance: a request's logits have the same bits whatever else is in the step and whatever its bucket.

A row's sums then have one order. Every product has one kernel with one tile for any number of rows, attention does not
split keys by what there is to do, and no launch is left to a library or to plain torch, whose algorithms depend on the
number of rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from graphserve.errors import ConfigError
from graphserve.plan.schema import Plan

# The rows that tiles are chosen for: enough for the matrix units of a prefill; a decode step leaves most of them empty.
INVARIANT_ROWS = 64
_PRODUCTS = ("linear", "linear_add", "linear_w8", "linear_w8a8")
_ATTENTION = ("paged_attention", "paged_attention_quant", "paged_attention_quant_rows")


def invariant_choices(op: str) -> dict[str, Any]:
    """Attributes that fix the form of an op's Triton kernels."""
    if op in _PRODUCTS:
        return {"product": "gemm", "bucket_rows": INVARIANT_ROWS}
    if op == "moe":
        return {"bucket_rows": INVARIANT_ROWS}
    return {"segments": 1, "max_query_len": 0} if op in _ATTENTION else {}


def require_kernels(plan: Plan, refusals: Mapping[int, str]) -> None:
    """Refuse a plan with launches that plain torch would run.

    Running them row by row instead would keep the bits too, but takes as many launches as a step has rows.

    Args:
        refusals: launch index → why it has no kernel.

    Raises:
        ConfigError: there are such launches.
    """
    if not refusals:
        return
    reasons = dict.fromkeys(f"{plan.launches[index].op} ({reason})" for index, reason in refusals.items())
    raise ConfigError(
        f"deterministic=True needs a generated kernel for every launch, since plain torch may add up in another order "
        f"for another number of rows; this plan has none for {'; '.join(reasons)}. Use deterministic=False"
    )
