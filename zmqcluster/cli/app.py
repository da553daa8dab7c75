"""One run of the command line: config, verb, and every error as a sentence and an exit code."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Final, TextIO

from zmqcluster.cli.arguments import config_flags
from zmqcluster.cli.call import DONE, FAILED, INTERRUPTED, UNREACHABLE, USAGE, Call, Verb
from zmqcluster.cli.output import Output
from zmqcluster.cli.serve import VERBS as SERVE_VERBS
from zmqcluster.config import ClusterConfig, load_config
from zmqcluster.errors import ClusterError, ConfigError, MasterUnreachable, RequestRefused
from zmqcluster.model import RefusalCode

CONFIG_ENV: Final = "ZMQCLUSTER_CONFIG"
DEBUG_ENV: Final = "ZMQCLUSTER_LOG_LEVEL"
# What the master refuses because the request was wrong, as the command line would have.
_USAGE_CODES: Final = frozenset(
    {RefusalCode.BAD_REQUEST, RefusalCode.UNKNOWN_TASK_TYPE, RefusalCode.BAD_PARAMETERS}
)


class DistributionCLI:
    """Runs the verb that was parsed."""

    def __init__(
        self,
        args: argparse.Namespace,
        *,
        env: Mapping[str, str] | None = None,
        stdout: TextIO | None = None,
        stderr: TextIO | None = None,
    ) -> None:
        """args: parsed by arguments.build_parser(). The others: this process's, unless given."""
        self.args = args
        self.env = os.environ if env is None else env
        self.out = Output(
            sys.stdout or _nowhere() if stdout is None else stdout,
            sys.stderr or _nowhere() if stderr is None else stderr,
            as_json=getattr(args, "json", False),
        )

    def load_config(self) -> ClusterConfig:
        """File, environment and flags as one checked config. Raises ConfigError."""
        verb: Verb = self.args.verb
        flags = config_flags(self.args)
        if verb in SERVE_VERBS:
            flags["mode"] = verb.name
        if self.args.config == "":
            raise ConfigError("--config", 'given ""; allowed: the path of a JSON file')
        file = self.args.config or self.env.get(CONFIG_ENV)
        return load_config(file=Path(file) if file else None, env=self.env, flags=flags)

    def run(self) -> int:
        """Do it; the exit code. Never raises for what a user, a peer or a disk did."""
        try:
            code = self._run_verb()
            self.out.stdout.flush()
            return code
        except KeyboardInterrupt:
            return INTERRUPTED
        except BrokenPipeError:
            return self._reader_left()
        except OSError as error:
            what = f"{error.filename}: " if error.filename else "input or output: "
            self.out.note(f"zmqcluster: {what}{error.strerror or error}")
            return FAILED
        except ClusterError as error:
            self.out.note(f"zmqcluster: {error}")
            return exit_code(error)
        except Exception as error:  # noqa: BLE001  # the top of the process: one of three doors
            self._tell_bug(error)
            return FAILED

    def _run_verb(self) -> int:
        verb: Verb = self.args.verb
        call = Call(self.args, self.load_config(), self.out, self.env)
        try:
            return verb.run(call)
        finally:
            call.close()

    def _reader_left(self) -> int:
        # `… | head` had enough. The interpreter would complain while flushing at its end.
        if self.out.stdout is sys.stdout:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return DONE

    def _tell_bug(self, error: Exception) -> None:
        logging.getLogger(__name__).debug("internal error", exc_info=error)
        self.out.note(
            f"zmqcluster: internal error, please report it: {type(error).__name__}: {error}"
        )
        if self.env.get(DEBUG_ENV) == "debug":
            traceback.print_exception(error, file=self.out.stderr)
        else:
            self.out.note(f"Set {DEBUG_ENV}=debug to see where it happened.")


def _nowhere() -> TextIO:
    """In place of a stream that was closed before we began."""
    return open(os.devnull, "w", encoding="utf-8")


def exit_code(error: ClusterError) -> int:
    """The documented exit code for an error."""
    match error:
        case ConfigError():
            return USAGE
        case MasterUnreachable():
            return UNREACHABLE
        case RequestRefused() if error.code in _USAGE_CODES:
            return USAGE
        case _:
            return FAILED
