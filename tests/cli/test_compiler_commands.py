"""``explain`` and ``warmup`` with the demo model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from graphserve.cli.main import main


def test_explain_prints_one_json_document(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["passes"] and isinstance(report["passes"], list)


def test_warmup_check_of_an_empty_store_is_status_1_and_stores_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = tmp_path / "store"
    assert main(["warmup", "--check", "--output", str(store)]) == 1
    assert "missing" in capsys.readouterr().out and not any(tmp_path.rglob("*.json"))
