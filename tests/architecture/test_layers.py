"""Imports go one way: the contracts of pyproject.toml hold."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def test_import_contracts_hold() -> None:
    tool = Path(sys.executable).with_name("lint-imports")

    done = subprocess.run(
        [str(tool), "--no-logo"], cwd=ROOT, capture_output=True, text=True, timeout=50, check=False
    )

    assert done.returncode == 0, done.stdout + done.stderr


def test_every_module_of_the_cluster_belongs_to_a_layer() -> None:
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]
    layers = contracts["contracts"][0]["layers"]
    listed = {name.strip() for layer in layers for name in layer.replace(":", "|").split("|")}

    modules = {
        f"zmqcluster.{path.stem}"
        for path in (ROOT / "zmqcluster").iterdir()
        if path.suffix == ".py" or (path / "__init__.py").exists()
    } - {"zmqcluster.__init__"}

    assert modules <= listed


@pytest.mark.parametrize(
    "path", sorted((ROOT / "zmqcluster").rglob("*.py")), ids=lambda path: str(path.name)
)
def test_only_the_clock_reads_clocks(path: Path) -> None:
    if path.name == "clock.py":
        return
    calls = {
        f"{node.value.id}.{node.attr}"
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)
    }

    assert not calls & {
        *("time.time", "time.time_ns", "time.monotonic", "time.monotonic_ns", "time.perf_counter"),
        *("datetime.now", "datetime.utcnow", "date.today"),
    }
