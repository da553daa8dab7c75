"""The frame around every verb: help, config, errors as sentences, exit codes."""

from __future__ import annotations

import argparse
import io
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.cli_run import run
from zmqcluster.cli import crawl
from zmqcluster.cli.app import DistributionCLI, exit_code
from zmqcluster.cli.arguments import build_parser, parse
from zmqcluster.cli.call import Verb
from zmqcluster.cli.serve import keys_of
from zmqcluster.config import KEYS
from zmqcluster.errors import (
    ClusterError,
    ConfigError,
    MasterUnreachable,
    RequestRefused,
    StartError,
    StorageError,
)
from zmqcluster.model import RefusalCode, SchedulerMode

ROOT = Path(__file__).parents[2]


def leaves(
    parser: argparse.ArgumentParser, words: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], argparse.ArgumentParser]]:
    """Every verb with the words that lead to it."""
    nested = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
    if not nested:
        yield words, parser
    for action in nested:
        for name, child in action.choices.items():
            yield from leaves(child, (*words, name))


VERBS = dict(leaves(build_parser()))


def main(*argv: str, **env: str) -> subprocess.CompletedProcess[str]:
    """The real thing, in a process of its own."""
    return subprocess.run(
        [sys.executable, "main.py", *argv],
        cwd=ROOT,
        env={"PATH": "/usr/bin:/bin", **env},
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )


@pytest.mark.parametrize("words", VERBS, ids=" ".join)
def test_every_verb_has_help_and_an_example_that_parses(words: tuple[str, ...]) -> None:
    help_text = VERBS[words].format_help()

    example = help_text.rpartition("example:\n")[2].strip()
    args = parse(example.removeprefix("python main.py ").split())

    assert help_text.startswith(f"usage: python main.py {' '.join(words)} ")
    assert args.verb.name == words[-1]


@pytest.mark.parametrize("words", VERBS, ids=" ".join)
def test_every_verb_that_prints_data_has_json(words: tuple[str, ...]) -> None:
    is_server = words[-1] in set(SchedulerMode)

    assert ("--json" in VERBS[words].format_help()) is not is_server


@pytest.mark.parametrize("mode", SchedulerMode)
def test_each_config_key_is_a_flag_where_it_means_something(mode: SchedulerMode) -> None:
    flags = VERBS["distribute", mode.value].format_help()

    for name in keys_of(mode):
        assert "--" + name.replace("_", "-") + " " in flags
    every = set().union(*(keys_of(mode) for mode in SchedulerMode))
    assert every == {key.name for key in KEYS} - {"mode"}


def test_the_verb_is_the_mode_and_flags_win(tmp_path: Path) -> None:
    file = tmp_path / "c.json"
    file.write_text('{"mode": "master", "labels": ["a"], "master_port": 9000}')
    args = parse(["distribute", "worker", "--labels", "x", "--labels", "y,z"])

    config = DistributionCLI(args, env={"ZMQCLUSTER_CONFIG": str(file)}).load_config()

    assert config.mode is SchedulerMode.WORKER
    assert config.labels == ("x", "y", "z")
    assert config.master_port == 9000


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ConfigError("mode", "no"), 2),
        (MasterUnreachable("away"), 3),
        (StartError("port in use"), 1),
        (StorageError("disk full"), 1),
        (RequestRefused(RefusalCode.UNKNOWN_TASK_TYPE, "no such type"), 2),
        (RequestRefused(RefusalCode.BAD_PARAMETERS, "url"), 2),
        (RequestRefused(RefusalCode.NOT_FOUND, "no such task"), 1),
        (RequestRefused("of tomorrow", "?"), 1),
        (ClusterError("some other"), 1),
    ],
)
def test_exit_codes(error: ClusterError, code: int) -> None:
    assert exit_code(error) == code


def test_wrong_config_is_one_line_and_exit_2() -> None:
    ran = main("distribute", "master", "--heartbeat-interval", "0")

    assert ran.returncode == 2
    assert ran.stderr.startswith("zmqcluster: heartbeat_interval: given ")
    assert ran.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("distribute x", "VERB: invalid choice: 'x' (choose from 'master', "),
        ("distribute task x", 'ID: given "x"; allowed: the number of a task or job (see '),
        ("distribute task 1 2", "unknown argument 2 (see python main.py distribute task --help)"),
        ("--x", "unknown argument --x (see python main.py --help)"),
        ("distribute submit noop --max-retry=3", "--max-retry=3; did you mean --max-retries?"),
        ("distribute submit noop --priority 11", '--priority: given "11"; allowed: a whole number'),
        ("distribute submit noop --timeout 8d", "allowed: a time such as 90, 0.5, 15m, 24h or 7d,"),
        ("distribute submit noop --not-before 2030-01-31T08:00:00", "date, time and zone"),
        ("distribute submit noop --unique-key=", '--unique-key: given ""; allowed: 1 to 2048'),
        ("crawl http://a/ --depth 1001", "allowed: a whole number from 0 to 1000"),
        ("crawl http://a/ --delay 2h", "or 7d, from 0 to 1 h"),
        ("distribute tasks --rate-key=", '--rate-key: given ""; allowed: 1 to 320'),
        ("distribute token create --advertise a/b", '--advertise: given "a/b"; allowed: a host'),
        ("distribute submit echo value=\udcff", 'given "value=\\udcff"; allowed: text in UTF-8'),
    ],
)
def test_a_wrong_argument_is_one_line_and_exit_2(
    words: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        parse(words.split())

    told = capsys.readouterr().err
    assert told.startswith("zmqcluster: ")
    assert said in told
    assert told.count("\n") == 1


@pytest.mark.parametrize("words", [[], ["distribute"], ["distribute", "token"]])
def test_without_a_verb_the_verbs_are_shown(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        parse(words)

    assert "verbs:\n  VERB\n" in capsys.readouterr().err


def test_ctrl_c_while_loading_ends_without_a_traceback(tmp_path: Path) -> None:
    package = tmp_path / "zmqcluster"
    package.mkdir()
    (package / "__init__.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n")
    (tmp_path / "main.py").write_bytes((ROOT / "main.py").read_bytes())

    ran = subprocess.run(
        [sys.executable, str(tmp_path / "main.py")],
        capture_output=True,
        text=True,
        timeout=20,
        check=False,
        # These tests may run in the background of a shell, which ignores it there.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )

    assert (ran.returncode, ran.stderr) == (-signal.SIGINT, "")


def test_help_can_be_printed_where_the_encoding_is_poor() -> None:
    ran = subprocess.run(
        [sys.executable, "main.py", "distribute", "worker", "--help"],
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
        capture_output=True,
        text=True,
        timeout=20,
        check=False,
    )

    assert (ran.returncode, ran.stderr) == (0, "")
    assert "--join-token ck1.AbC?" in ran.stdout


class Hangup(io.StringIO):
    """A stream whose reader has left."""

    def write(self, text: str) -> int:
        raise BrokenPipeError


def test_an_error_nobody_can_read_keeps_its_exit_code() -> None:
    args = parse(["distribute", "status", "--config", "/nope.json"])

    assert DistributionCLI(args, env={}, stdout=io.StringIO(), stderr=Hangup()).run() == 2


def test_an_empty_path_of_a_config_is_refused_not_ignored() -> None:
    stderr = io.StringIO()
    args = parse(["distribute", "status", "--config", ""])

    assert DistributionCLI(args, env={}, stdout=io.StringIO(), stderr=stderr).run() == 2
    assert stderr.getvalue() == 'zmqcluster: --config: given ""; allowed: the path of a JSON file\n'


def test_abbreviated_flags_are_refused() -> None:
    with pytest.raises(SystemExit, match="2"):
        parse(["distribute", "status", "--master-p", "80"])


def test_words_may_stand_on_both_sides_of_a_flag() -> None:
    args = parse(["distribute", "submit", "echo", "a=1", "--wait", "b=2"])

    assert (args.type, args.pairs) == ("echo", [("a", 1), ("b", 2)])
    with pytest.raises(SystemExit, match="2"):
        parse(["distribute", "submit", "echo", "--wait", "b"])
    with pytest.raises(SystemExit, match="2"):
        parse(["distribute", "status", "what"])


def test_python_that_lacks_the_packages_says_what_to_run() -> None:
    ran = subprocess.run(
        [sys.executable, "-S", "main.py", "--help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )

    assert ran.returncode == 1
    assert "make setup" in ran.stderr
    assert "Traceback" not in ran.stderr


def test_interrupted_is_130(monkeypatch: pytest.MonkeyPatch) -> None:
    args = parse(["distribute", "status"])
    args.verb = Verb("status", "", "", _raise_interrupt)

    assert DistributionCLI(args, env={}).run() == 130


def test_a_bug_of_ours_is_told_without_a_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    args = parse(["distribute", "status"])
    args.verb = Verb("status", "", "", _raise_bug)

    assert DistributionCLI(args, env={}).run() == 1
    assert "internal error, please report it: ZeroDivisionError" in capsys.readouterr().err

    debug = {"ZMQCLUSTER_LOG_LEVEL": "debug"}
    assert DistributionCLI(args, env=debug).run() == 1
    assert "Traceback" in capsys.readouterr().err


def test_reader_that_had_enough_is_no_error() -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", _ENDLESS], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr is not None
    errors = process.stderr.read()
    process.stderr.close()

    assert process.wait(30) == 0
    assert errors == b""


def test_public_site_needs_a_contact_before_anything_is_asked() -> None:
    ran = run("crawl", "https://example.org/")

    assert ran.code == 2
    assert ran.err.startswith("zmqcluster: contact: crawling example.org needs a contact")


@pytest.mark.parametrize(
    ("host", "allow", "public"),
    [
        ("example.org", (), True),
        ("93.184.216.34", (), True),
        ("93.184.216.34", ("10.0.0.0/8",), True),
        ("127.0.0.1", (), False),
        ("[::1]", (), False),
        ("localhost", (), False),
        ("intranet", ("10.0.0.0/8",), False),
    ],
)
def test_which_hosts_look_public(host: str, allow: tuple[str, ...], public: bool) -> None:
    assert crawl._looks_public(host, allow) is public


def _raise_interrupt(_: object) -> int:
    raise KeyboardInterrupt


def _raise_bug(_: object) -> int:
    return 1 // 0


_ENDLESS = """
import sys
from zmqcluster.cli.app import DistributionCLI
from zmqcluster.cli.arguments import parse
from zmqcluster.cli.show import Verb

def endless(call):
    while True:
        call.out.line("x" * 1000)

args = parse(["distribute", "status"])
args.verb = Verb("status", "", "", endless)
sys.exit(DistributionCLI(args, env={}).run())
"""
