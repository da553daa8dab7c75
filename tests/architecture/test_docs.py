"""What the manual says and what the program does are the same."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from scripts import dev, docs_tables
from zmqcluster.cli.arguments import parse
from zmqcluster.config import KEYS, load_config

ROOT = Path(__file__).parents[2]
PAGES = docs_tables.pages()
COMMAND = re.compile(
    r"^(?:\s*|.*`)\$? ?(?:\.venv/bin/)?python main\.py ([^`\n]+?)`?$", re.MULTILINE
)
FLAG = re.compile(r"`?(--[a-z][a-z-]+)")
ENV = re.compile(r"ZMQCLUSTER_[A-Z_]+[A-Z]")


def commands() -> list[str]:
    """Every command line of ours in the manual's code blocks."""
    found = []
    for page in PAGES:
        for block in re.findall(r"^(?: {4}.*\n)+|```.*?```", page.read_text(), re.M | re.S):
            found += [match.strip().removesuffix(" &") for match in COMMAND.findall(block)]
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_tables_made_from_code_are_up_to_date(page: Path) -> None:
    text = page.read_text(encoding="utf-8")

    assert docs_tables.with_tables(text) == text, "run `make fix`"


def test_config_and_commands_are_documented_whole() -> None:
    config = (ROOT / "docs" / "configuration.md").read_text()
    verbs = (ROOT / "docs" / "commands.md").read_text()

    assert all(f"| `{key.name}` |" in config for key in KEYS)
    assert "| `distribute token create` |" in verbs


@pytest.mark.parametrize("line", commands())
def test_command_lines_in_the_manual_parse(line: str) -> None:
    words = shlex.split(line, comments=True)

    assert parse(words).verb.name in words


def test_the_manual_has_command_lines() -> None:
    assert len(commands()) >= 8


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_variables_in_the_manual_exist(page: Path) -> None:
    for name in ENV.findall(page.read_text()):
        known = {key.env for key in KEYS} | {"ZMQCLUSTER_CONFIG", "ZMQCLUSTER_API_TOKEN"}
        assert name in known | {"ZMQCLUSTER_LOG_LEVEL"}


def test_documented_defaults_are_accepted_when_given() -> None:
    for key in KEYS:
        text = re.search(rf"^\| `{key.name}` \| `?([^`|]+)`? \|", docs_tables.config_table(), re.M)
        assert text is not None
        if text[1].strip() != "none":
            assert getattr(load_config(flags={key.name: text[1]}), key.name) == key.default


def test_every_dependency_is_explained() -> None:
    explained = (ROOT / "docs" / "dependencies.md").read_text()
    required = re.findall(r"^([A-Za-z0-9_.-]+)==", (ROOT / "requirements.txt").read_text(), re.M)

    assert len(required) > 10
    assert [name for name in required if name not in explained] == []


def test_every_dependency_is_pinned() -> None:
    lines = (ROOT / "requirements.txt").read_text().splitlines()

    assert [line for line in lines if line and not line.startswith("#") and "==" not in line] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_in_the_manual_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\((?!https?:|#|mailto:)([^)#]+)", page.read_text()):
        assert (page.parent / target).exists(), target


def test_make_targets_are_verbs_of_the_dev_script() -> None:
    verbs = re.search(r"^VERBS = (.*)$", (ROOT / "Makefile").read_text(), re.M)

    assert verbs is not None
    assert set(verbs[1].split()) == set(dev.VERBS)
