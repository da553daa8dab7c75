"""A small client of the REST API: one kept connection, typed answers, errors in plain words."""

from __future__ import annotations

import http.client
import os
import re
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, TypeVar
from urllib.parse import urlencode

import msgspec

from zmqcluster.config import ClusterConfig
from zmqcluster.errors import ConfigError, MasterUnreachable, RemoteProtocolError, RequestRefused
from zmqcluster.model import RefusalCode
from zmqcluster.rest.schemas import ProblemView
from zmqcluster.security.datadir import read_small_file

T = TypeVar("T")

PREFIX: Final = "/api/distribution"
TOKEN_ENV: Final = "ZMQCLUSTER_API_TOKEN"
CONNECT_S: Final = 5.0
ANSWER_S: Final = 60.0
ANSWER_BYTES_MAX: Final = 64 * 1024 * 1024
TOKEN_CHARS_MAX: Final = 1024
# Answers that say "not now": a caller that only reads, and waits anyway, may ask again.
NOT_NOW: Final = frozenset({RefusalCode.BUSY, RefusalCode.STOPPING, "unavailable", "timeout"})


class Api:
    """Asks the master's REST API. Not for several threads at once."""

    def __init__(self, config: ClusterConfig, token: str) -> None:
        self.url = config.rest_url
        self._token = token
        self._connection = http.client.HTTPConnection(
            config.master_host, config.master_port, timeout=CONNECT_S
        )

    def get(self, path: str, answer: type[T], query: Mapping[str, Any] | None = None) -> T:
        """Read something. query: None values are left out."""
        given = {name: value for name, value in (query or {}).items() if value is not None}
        full = f"{path}?{urlencode(given)}" if given else path
        return self.ask("GET", full, answer)

    def ask(self, method: str, path: str, answer: type[T], body: Any = None, *, key: str = "") -> T:
        """One request and its typed answer.

        body: anything msgspec can make JSON of, or bytes that are JSON already. key: the
        Idempotency-Key; requests that have one (and reads) are asked again when the connection
        breaks before the answer.

        Raises MasterUnreachable, RequestRefused, or RemoteProtocolError for an answer that makes
        no sense.
        """
        payload = body if isinstance(body, bytes) else msgspec.json.encode(body)
        if method == "GET" or body is None:
            payload = b""
        headers = self._headers(has_body=bool(payload), key=key)
        safe_again = method == "GET" or bool(key)
        status, data = self._exchange(method, PREFIX + path, payload, headers, safe_again)
        if status >= 400:
            raise self._refusal(status, data)
        return self._decoded(data, answer)

    def close(self) -> None:
        self._connection.close()

    def _headers(self, *, has_body: bool, key: str) -> dict[str, str]:
        headers = {"Accept": "application/json"}
        if self._token:
            headers["Authorization"] = f"Bearer {self._token}"
        if has_body:
            headers["Content-Type"] = "application/json"
        if key:
            headers["Idempotency-Key"] = key
        return headers

    def _exchange(
        self, method: str, path: str, payload: bytes, headers: dict[str, str], safe_again: bool
    ) -> tuple[int, bytes]:
        """Status and body; once more when an idle connection was closed under us, as it may be."""
        for last_try in (not safe_again, True):
            was_open = self._connection.sock is not None
            try:
                return self._once(method, path, payload, headers)
            except (OSError, http.client.HTTPException) as error:
                self._connection.close()
                if last_try or not (was_open or isinstance(error, ConnectionResetError)):
                    raise self._unreachable(error) from None
        raise AssertionError("the last try returns or raises")

    def _once(
        self, method: str, path: str, payload: bytes, headers: dict[str, str]
    ) -> tuple[int, bytes]:
        connection = self._connection
        if connection.sock is None:
            connection.timeout = CONNECT_S
            connection.connect()
            _socket_of(connection).settimeout(ANSWER_S)
        connection.request(method, path, payload or None, headers)
        answer = connection.getresponse()
        data = answer.read(ANSWER_BYTES_MAX + 1)
        if len(data) > ANSWER_BYTES_MAX:
            connection.close()
            raise RemoteProtocolError(f"an answer of more than {ANSWER_BYTES_MAX} bytes")
        return answer.status, data

    def _unreachable(self, error: Exception) -> MasterUnreachable:
        if isinstance(error, http.client.HTTPException) and not isinstance(
            error, http.client.RemoteDisconnected | http.client.IncompleteRead
        ):
            return MasterUnreachable(
                f"what listens at {self.url} is no master: check --master-host and --master-port"
            )
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        return MasterUnreachable(
            f"no master answers at {self.url} ({reason}): start one with "
            "`python main.py distribute master`, or name its place with "
            "--master-host and --master-port"
        )

    def _refusal(self, status: int, data: bytes) -> Exception:
        try:
            problem = msgspec.json.decode(data, type=ProblemView)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            return RemoteProtocolError(
                f"{self.url} answered HTTP {status} without saying why: is it a master?"
            )
        if status == 401 and not self._token:
            hint = f"Commands find it with --data-dir, --api-token-file or {TOKEN_ENV}."
            return RequestRefused(problem.code, f"{problem.detail} {hint}")
        return RequestRefused(problem.code, problem.detail)

    def _decoded(self, data: bytes, answer: type[T]) -> T:
        try:
            return msgspec.json.decode(data, type=answer)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise RemoteProtocolError(
                f"{self.url} gave an answer this version cannot read ({error}): "
                "is the master of another version, or no master at all?"
            ) from None


def _socket_of(connection: http.client.HTTPConnection) -> socket.socket:
    assert isinstance(connection.sock, socket.socket)
    return connection.sock


def find_token(config: ClusterConfig, file: str | None, env: Mapping[str, str]) -> str:
    """The REST token: from the file given, the environment, or data_dir; "" when there is none.

    Raises ConfigError for a file that cannot be read or holds no token.
    """
    if file is not None:
        return _token_in(Path(file), "--api-token-file")
    if env.get(TOKEN_ENV):
        return _checked_token(env[TOKEN_ENV], TOKEN_ENV)
    path = Path(config.data_dir) / "api-token"
    # Reading must not create a data directory where there is none.
    if not os.access(path, os.R_OK):
        return ""
    text = read_small_file(path, secret=True)
    return _checked_token(text or "", str(path)) if text else ""


def _token_in(path: Path, key: str) -> str:
    try:
        with path.open("rb") as stream:
            text = stream.read(TOKEN_CHARS_MAX + 2).decode("ascii")
    except OSError as error:
        raise ConfigError(key, f"cannot read {str(path)!r}: {error.strerror}") from None
    except ValueError:
        raise ConfigError(key, f"{str(path)!r} holds no token") from None
    return _checked_token(text, key)


def _checked_token(text: str, key: str) -> str:
    token = text.strip()
    # It becomes a header: one line of plain ASCII, or nothing.
    if not re.fullmatch(r"[!-~]{1,1024}", token):
        raise ConfigError(key, "holds no token; a token is one word, as in data_dir/api-token")
    return token
