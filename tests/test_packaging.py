"""What the package promises: two one-line commands, one version, a licence, pins for its ranges, complete wheels."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

import graphserve


@pytest.fixture(scope="module")
def project(repository: Path) -> dict:
    return tomllib.loads((repository / "pyproject.toml").read_text())


@pytest.fixture(scope="module")
def pins(repository: Path) -> dict[str, Version]:
    lines = (repository / "constraints.txt").read_text().splitlines()
    pairs = (line.split("==") for line in lines if line and not line.startswith("#"))
    return {normal(name): Version(version) for name, version in pairs}


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def bash_blocks(text: str) -> list[str]:
    """Return the bodies of the ``bash`` blocks of a markdown text."""
    return re.findall(r"^```bash\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)


def test_the_first_two_commands_of_the_readme_are_one_line_each(repository: Path) -> None:
    install, test = bash_blocks((repository / "README.md").read_text())[:2]
    for block in (install, test):
        assert len(block.splitlines()) == 1
        assert block.startswith("python3 -m venv .venv && .venv/bin/pip install -q -c constraints.txt ")
    assert "graphserve generate --prompt" in install
    assert ".[test]" in test
    assert "pytest" in test


def test_ci_runs_the_second_command_of_the_readme(repository: Path) -> None:
    script = (repository / ".ci" / "run").read_text()
    extract = re.search(r"test_command=\$\((awk .*? README\.md)\)", script)
    assert extract, "the CI script no longer reads its test command from the README"
    result = subprocess.run(["bash", "-c", extract[1]], cwd=repository, capture_output=True, text=True, check=True)
    assert result.stdout == bash_blocks((repository / "README.md").read_text())[1]


def test_every_readme_link_leads_to_a_file(repository: Path) -> None:
    for name in ("README.md", "CONTRIBUTING.md", "graphserve/demo/README.md"):
        page = repository / name
        for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{name} links to {target}"


def test_the_line_counts_of_the_reading_order_are_close_to_the_truth(repository: Path) -> None:
    rows = re.findall(
        r"^\| \[`([^`]+\.py)`\]\([^)]+\) \| (\d+) \|", (repository / "README.md").read_text(), re.MULTILINE
    )
    assert len(rows) >= 8
    for name, lines in rows:
        found = len((repository / name).read_text().splitlines())
        assert abs(found - int(lines)) <= 0.25 * found, f"{name} has {found} lines, the README says {lines}"


def test_the_changelog_names_the_version(repository: Path) -> None:
    newest = re.search(r"^## \[([^\]]+)\]", (repository / "CHANGELOG.md").read_text(), flags=re.MULTILINE)
    assert newest and newest[1] == graphserve.__version__


def test_the_licence_is_apache_2(repository: Path, project: dict) -> None:
    assert project["project"]["license"] == "Apache-2.0"
    text = (repository / "LICENSE").read_text()
    assert "Apache License" in text and "Version 2.0, January 2004" in text and "END OF TERMS AND CONDITIONS" in text


def test_every_dependency_is_pinned_to_a_version_in_its_range(project: dict, pins: dict[str, Version]) -> None:
    declared = project["project"]["dependencies"] + project["project"]["optional-dependencies"]["test"]
    for requirement in map(Requirement, declared):
        assert normal(requirement.name) in pins, f"{requirement.name} has no pin in constraints.txt"
        assert requirement.specifier.contains(pins[normal(requirement.name)]), str(requirement)


def test_pins_name_no_build_of_torch_that_only_one_machine_has(pins: dict[str, Version]) -> None:
    assert pins["torch"].local is None


def test_a_wheel_carries_the_demo_model_and_the_licence(repository: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(repository / name, source)
    shutil.copytree(repository / "graphserve", source / "graphserve", ignore=shutil.ignore_patterns("__pycache__"))
    build = f"import setuptools.build_meta as backend; print(backend.build_wheel({str(tmp_path)!r}))"
    result = subprocess.run([sys.executable, "-c", build], cwd=source, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    [wheel] = tmp_path.glob("*.whl")
    assert wheel.name.startswith(f"graphserve-{graphserve.__version__}-py3-none-any")
    names = set(zipfile.ZipFile(wheel).namelist())
    demo = {
        f"graphserve/demo/{path.name}" for path in (source / "graphserve" / "demo").iterdir() if path.suffix != ".md"
    }
    assert demo - names == set()
    assert "graphserve/demo/model.safetensors" in demo
    assert any(name.endswith("licenses/LICENSE") for name in names)
    scripts = next(name for name in names if name.endswith("entry_points.txt"))
    assert "graphserve = graphserve.cli.main:run_process" in zipfile.ZipFile(wheel).read(scripts).decode()
