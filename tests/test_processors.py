"""Threads within the container's share of processor time."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from graphserve import processors
from graphserve.processors import granted_processors, usable_threads


@pytest.mark.parametrize(
    ("text", "expected"),
    [("max 100000", None), ("200000 100000", 2), ("150000 100000", 2), ("50000 100000", 1), ("", None), ("?", None)],
)
def test_the_limit_of_a_version_2_group(text: str, expected: int | None, tmp_path: Path) -> None:
    (tmp_path / "cpu.max").write_text(text + "\n")
    assert granted_processors(tmp_path) == expected


@pytest.mark.parametrize(("quota", "expected"), [("-1", None), ("400000", 4), ("250000", 3), ("0", None)])
def test_the_limit_of_a_version_1_group(quota: str, expected: int | None, tmp_path: Path) -> None:
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu" / "cpu.cfs_quota_us").write_text(quota + "\n")
    (tmp_path / "cpu" / "cpu.cfs_period_us").write_text("100000\n")
    assert granted_processors(tmp_path) == expected


def test_a_machine_without_control_groups_has_no_limit(tmp_path: Path) -> None:
    assert granted_processors(tmp_path) is None


@pytest.mark.parametrize(
    ("torchs", "bound", "granted", "expected"), [(64, 64, 2, 2), (2, 64, 64, 2), (8, 9, None, 8), (64, 3, None, 3)]
)
def test_the_smallest_number_counts(
    torchs: int, bound: int, granted: int | None, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: torchs)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(bound)))
    monkeypatch.setattr(processors, "granted_processors", lambda: granted)
    monkeypatch.setattr(processors, "available_processors", processors.available_processors.__wrapped__)
    assert usable_threads() == expected
