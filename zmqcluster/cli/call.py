"""What every verb gets: its arguments, the config, a place to print and a way to the master."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from typing import Any, Final

from msgspec import Struct

from zmqcluster.cli.http import Api, find_token
from zmqcluster.cli.output import Output
from zmqcluster.config import ClusterConfig

DONE: Final = 0
FAILED: Final = 1
USAGE: Final = 2
UNREACHABLE: Final = 3
INTERRUPTED: Final = 130


class Call:
    """One run of one verb. Closes the connection it opened when left."""

    def __init__(
        self,
        args: argparse.Namespace,
        config: ClusterConfig,
        out: Output,
        env: Mapping[str, str],
    ) -> None:
        self.args = args
        self.config = config
        self.out = out
        self._env = env
        self._api: Api | None = None

    @property
    def api(self) -> Api:
        """The master's REST API; connects at the first question. Raises ConfigError."""
        if self._api is None:
            token = find_token(self.config, self.args.api_token_file, self._env)
            self._api = Api(self.config, token)
        return self._api

    def close(self) -> None:
        if self._api is not None:
            self._api.close()


class Words(Struct, frozen=True):
    """The list of words a verb takes: where the parser puts them, and how one is read."""

    into: str
    read: Callable[[str], Any]


class Verb(Struct, frozen=True):
    """One verb of the command line.

    run: returns the exit code. keys: config keys that are flags of this verb.
    prints_data: has --json. talks: asks the REST API, and so has --api-token-file.
    """

    name: str
    help: str
    example: str
    run: Callable[[Call], int]
    arguments: Callable[[argparse.ArgumentParser], None] | None = None
    keys: tuple[str, ...] = ("master_host", "master_port", "data_dir")
    prints_data: bool = True
    talks: bool = True
    words: Words | None = None
