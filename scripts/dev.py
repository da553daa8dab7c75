"""The dev loop: `make VERB` calls this file, and so may you. Needs nothing but Python 3.11.

Verbs make the virtual environment themselves when it is missing or out of date.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
STAMP = VENV / "requirements.sha256"
OLDEST = (3, 11)
NEWER = ("python3.11", "python3.12", "python3.13", "python3.14")
CACHES = (
    ".mypy_cache",
    ".ruff_cache",
    ".pytest_cache",
    ".hypothesis",
    ".import_linter_cache",
    "bench-results",
)

# Each ends with one line of totals, and fails when a promise was broken.
PROOF = {
    "tests": ("pytest",),
    "models": ("pytest", "tests/model", "tests/acceptance/test_openapi.py"),
    "simulation": ("python", "scripts/simulate.py", "--ci"),
    "planted bugs": ("python", "scripts/mutants.py"),
    "failing disks": ("python", "scripts/storage_faults.py"),
    "real faults": ("python", "scripts/chaos.py", "all"),
}

# With more examples than a developer waits for.
PROOF_ENVIRONMENT = {"models": {"HYPOTHESIS_PROFILE": "deep"}}

FAST_TESTS = ["tests/unit", "tests/model", "tests/architecture"]
SLOW_TESTS = ["tests/integration", "tests/acceptance"]


class Failed(Exception):
    """A step failed; its own output has said why. Carries the exit code."""


def main(argv: list[str]) -> int:
    verb, *rest = argv or ["help"]
    if verb in ("-h", "--help"):
        verb = "help"
    if verb not in VERBS:
        print(f"no such verb: {verb}; there are: {', '.join(VERBS)}", file=sys.stderr)
        return 2
    try:
        require_python(argv)
        VERBS[verb](rest)
    except Failed as failed:
        return int(failed.args[0])
    except KeyboardInterrupt:
        return 130
    return 0


# --- verbs ---------------------------------------------------------------------------------------


def help_verb(_: list[str]) -> None:
    """show this"""
    print("make VERB, or python3 scripts/dev.py VERB [more words for the tool behind it]\n")
    for name, verb in VERBS.items():
        print(f"  {name:<8} {verb.__doc__}")


def setup(_: list[str]) -> None:
    """make .venv with the pinned requirements; done in no time when nothing changed"""
    wanted = wanted_stamp()
    if STAMP.exists() and STAMP.read_text() == wanted and venv_works():
        return
    if not venv_works():
        say("Making .venv")
        make_venv()
    install()
    STAMP.write_text(wanted)


def fix(_: list[str]) -> None:
    """format the code, repair what ruff can, bring the tables in docs/ up to date"""
    setup([])
    tool("ruff", "format", ".")
    tool("python", "scripts/docs_tables.py")
    tool("ruff", "check", "--fix", ".")


def check(_: list[str]) -> None:
    """ruff, mypy strict, import contracts, unit, model and architecture tests"""
    setup([])
    static()
    step("tests", "pytest", *existing(FAST_TESTS))


def test(rest: list[str]) -> None:
    """set up, then all tests"""
    setup([])
    tool("pytest", *rest)


def accept(rest: list[str]) -> None:
    """integration and acceptance tests: real processes, on loopback only"""
    setup([])
    tool("pytest", *existing(SLOW_TESTS), *rest)


def sim(rest: list[str]) -> None:
    """a minute of the simulation; with words: as they say, see scripts/simulate.py --help"""
    setup([])
    tool("python", "scripts/simulate.py", *(rest or ["--minutes", "1"]))


def sim_long(rest: list[str]) -> None:
    """an hour of the simulation, all violations and not only the first"""
    setup([])
    tool("python", "scripts/simulate.py", "--minutes", "60", "--failures", "20", *rest)


def mutants(rest: list[str]) -> None:
    """plant bugs, one at a time: the simulation must catch each"""
    setup([])
    tool("python", "scripts/mutants.py", *rest)


def bench(rest: list[str]) -> None:
    """measure; see docs/performance.md"""
    setup([])
    tool("python", "scripts/bench.py", *rest)


def demo(rest: list[str]) -> None:
    """start a cluster and a small site here, crawl it, show what came of it"""
    setup([])
    tool("python", "scripts/demo.py", *rest)


def chaos(rest: list[str]) -> None:
    """real faults on a real cluster: all of the CI tier, or what follows (list, run 8, soak)"""
    setup([])
    tool("python", "scripts/chaos.py", *(rest or ["all"]))


def prove(_: list[str]) -> None:
    """the whole proof: all tests, simulation, planted bugs, failing disks, real faults"""
    setup([])
    static()
    began = time.monotonic()
    parts = [part(name, *command) for name, command in PROOF.items()]
    width = max(map(len, PROOF))
    say("")
    for each in parts:
        say(f"{each.mark:<7} {each.name:<{width}} {each.took_s:4.0f} s  {each.totals[0]}")
        for line in each.totals[1:]:
            say(f"{'':{width + 16}}{line}")
    broken = sum(each.code != 0 for each in parts)
    left_out = sum(each.mark in ("SKIPPED", "PARTLY") for each in parts)
    took_min = (time.monotonic() - began) / 60
    say(
        f"{len(parts)} parts, {broken} broken, {left_out} not or only partly tried, "
        f"in {took_min:.1f} minutes"
    )
    if broken:
        raise Failed(1)


def ci(_: list[str]) -> None:
    """all but bench, cheapest first"""
    setup([])
    static()
    tool("pytest")


def clean(_: list[str]) -> None:
    """remove .venv, caches and measurements; never your data"""
    for name in (*CACHES, ".venv"):
        shutil.rmtree(ROOT / name, ignore_errors=True)
    for folder in ROOT.rglob("__pycache__"):
        shutil.rmtree(folder, ignore_errors=True)


VERBS = {
    "help": help_verb,
    "setup": setup,
    "fix": fix,
    "check": check,
    "test": test,
    "accept": accept,
    "sim": sim,
    "sim-long": sim_long,
    "mutants": mutants,
    "bench": bench,
    "demo": demo,
    "chaos": chaos,
    "prove": prove,
    "ci": ci,
    "clean": clean,
}


def static() -> None:
    """What needs no run of the code."""
    step("format", "ruff", "format", "--check", "--quiet", ".")
    step("lint", "ruff", "check", "--quiet", ".")
    step("layers", "lint-imports", "--no-logo")
    step("types", "mypy")


# --- the environment -----------------------------------------------------------------------------


def require_python(argv: list[str]) -> None:
    """Go on with a newer Python when this one is too old and there is one."""
    if sys.version_info >= OLDEST:
        return
    for name in NEWER:
        path = shutil.which(name)
        if path is not None:
            os.execv(path, [path, str(Path(__file__).resolve()), *argv])
    have = sys.version.split()[0]
    print(
        f"Python 3.11 or newer is needed; {sys.executable} is {have}, and none of "
        f"{', '.join(NEWER)} is on the PATH. Install one, or name it: make PYTHON=/path/to/python",
        file=sys.stderr,
    )
    raise Failed(1)


def wanted_stamp() -> str:
    """What .venv was made from; another text means it is out of date."""
    requirements = (ROOT / "requirements.txt").read_bytes()
    return f"{hashlib.sha256(requirements).hexdigest()} {sys.version_info[0]}.{sys.version_info[1]}"


def venv_works() -> bool:
    """Is there a .venv whose Python still runs and is new enough?"""
    python = VENV / "bin" / "python"
    probe = "import sys, pip; sys.exit(sys.version_info < (3, 11))"
    quiet = subprocess.DEVNULL
    try:
        done = subprocess.run([str(python), "-c", probe], stdout=quiet, stderr=quiet, check=False)
    except OSError:
        return False
    return done.returncode == 0


def make_venv() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "venv", "--clear", str(VENV)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if done.returncode:
        version = f"{sys.version_info[0]}.{sys.version_info[1]}"
        print(done.stdout.strip(), file=sys.stderr)
        print(
            f"Cannot make a virtual environment. On Debian and Ubuntu: "
            f"apt install python{version}-venv, then once more.",
            file=sys.stderr,
        )
        raise Failed(1)


def install() -> None:
    """Install the requirements, with one line of progress."""
    began = time.monotonic()
    names = [line for line in (ROOT / "requirements.txt").read_text().splitlines() if "==" in line]
    say(f"Installing {len(names)} pinned packages and what they need (about a minute)")
    command = [str(VENV / "bin" / "python"), "-m", "pip", "install", "--no-input"]
    command += ["--disable-pip-version-check", "--progress-bar", "off", "-r", "requirements.txt"]
    lines: list[str] = []
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    assert process.stdout is not None
    collected = 0
    for line in process.stdout:
        lines.append(line)
        collected += line.startswith("Collecting")
        if sys.stdout.isatty():
            print(
                f"\r  {collected} collected, {time.monotonic() - began:.0f} s", end="", flush=True
            )
    if sys.stdout.isatty():
        print("\r" + " " * 40 + "\r", end="")
    if process.wait():
        print("".join(lines[-20:]), file=sys.stderr)
        print("The packages could not be installed; the lines above say why.", file=sys.stderr)
        raise Failed(1)
    say(f"Installed in {time.monotonic() - began:.0f} s")


# --- running tools -------------------------------------------------------------------------------


def step(name: str, *command: str) -> None:
    """One named step, quiet when it succeeds, with how long it took."""
    began = time.monotonic()
    done = subprocess.run(
        tool_command(*command),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    last = (done.stdout.strip().splitlines() or [""])[-1]
    if done.returncode:
        print(done.stdout)
        print(f"{name}: failed")
        raise Failed(1)
    say(f"{name:<8} {time.monotonic() - began:5.1f} s  {last}")


class Part(NamedTuple):
    """A part of the proof that ended. totals: the last line it said, and those that say `tried`."""

    name: str
    code: int
    took_s: float
    totals: list[str]

    @property
    def mark(self) -> str:
        if self.code:
            return "BROKEN"
        first = self.totals[0].partition(",")[0]
        return first if first in ("SKIPPED", "PARTLY") else "holds"


def part(name: str, *command: str) -> Part:
    """Run it to its end with its output as it comes."""
    say(f"\n=== {name}")
    began = time.monotonic()
    process = subprocess.Popen(
        tool_command(*command),
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env={**os.environ, "PYTHONUNBUFFERED": "1", **PROOF_ENVIRONMENT.get(name, {})},
    )
    assert process.stdout is not None
    last, tried = "", []
    for line in process.stdout:
        print(line, end="", flush=True)
        last = line.strip() or last
        if line.startswith("tried: "):
            tried.append(line.strip())
    return Part(name, process.wait(), time.monotonic() - began, [last, *tried])


def tool(*command: str) -> None:
    """Run a tool of the environment with its output as it comes."""
    sys.stdout.flush()
    done = subprocess.run(tool_command(*command), cwd=ROOT, check=False)
    if done.returncode:
        raise Failed(done.returncode if done.returncode > 0 else 1)


def tool_command(name: str, *arguments: str) -> list[str]:
    if name in ("pytest", "mypy"):
        return [str(VENV / "bin" / "python"), "-m", name, *arguments]
    return [str(VENV / "bin" / name), *arguments]


def existing(folders: list[str]) -> list[str]:
    return [folder for folder in folders if (ROOT / folder).is_dir()]


def say(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
