"""``explain`` with the demo model."""

from __future__ import annotations

import json

import pytest

from graphserve.cli.main import main


def test_explain_prints_one_json_document(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["passes"] and isinstance(report["passes"], list)
