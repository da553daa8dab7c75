"""Where apps and their data come from: one TOML file a source, declared instead of coded.

    base_url = "https://api.example.com"    # "" or left out: the task brings it
    delay_s = 1.0                           # told to the whole fleet, as concurrency is

    [user_apps]                             # likewise [app_sync], [data_sync]
    path = "/users/{username}/apps"         # appended to base_url; values are percent-encoded
    items = "data.apps"                     # where the rows are: names and positions, by dots
    key = "id"                              # in a row, what tells rows apart
    date = "day"                            # in a row, its day; rows outside the range are left out
    next = "links.next"                     # the URL of the next page
    [user_apps.fields]                      # what a row is kept as; left out: the row as it is
    name = "title"

An operator's own files lie in `sources/` in the worker's data directory, and win over those here.
"""

from __future__ import annotations

import datetime
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Final
from urllib.parse import quote

import msgspec
import msgspec.toml
from msgspec import Meta, Struct

from zmqcluster.errors import TaskRejected

SHIPPED: Final = Path(__file__).parent
NAME_PATTERN: Final = r"^[a-z][a-z0-9_-]{0,31}$"
SOURCE_BYTES_MAX: Final = 256 * 1024

SourceName = Annotated[str, Meta(pattern=NAME_PATTERN)]

_PLACE: Final = re.compile(r"\{([a-z_]+)\}")


class Endpoint(Struct, frozen=True, forbid_unknown_fields=True):
    """One question a source answers; see the module's docstring."""

    path: Annotated[str, Meta(pattern="^/")]
    key: str
    items: str = ""
    date: str = ""
    next: str = ""
    fields: dict[str, str] = msgspec.field(default_factory=dict)

    def url(self, base_url: str, values: Mapping[str, str]) -> str:
        """The URL to ask. Raises TaskRejected when the path needs a value that is not there."""

        def value(place: re.Match[str]) -> str:
            if place[1] not in values:
                raise TaskRejected(f"the source's path {self.path!r} needs {place[1]}")
            return quote(values[place[1]], safe="")

        return base_url.rstrip("/") + _PLACE.sub(value, self.path)

    def rows(self, document: Any) -> list[Any]:
        """The rows of an answer; a source that gives one row without a list means one."""
        found = at(document, self.items)
        if found is None:
            return []
        return found if isinstance(found, list) else [found]

    def kept(self, row: Any) -> dict[str, Any]:
        """What is kept of a row."""
        if self.fields:
            return {name: at(row, path) for name, path in self.fields.items()}
        return row if isinstance(row, dict) else {"value": row}

    def key_of(self, row: Any) -> str:
        """What tells this row from others; "" when it has no such value."""
        found = at(row, self.key)
        return "" if found is None or isinstance(found, dict | list) else str(found)

    def day_of(self, row: Any) -> datetime.date | None:
        """The row's day; None when the source gives none that can be read."""
        text = str(at(row, self.date))[:10] if self.date else ""
        try:
            return datetime.date.fromisoformat(text)
        except ValueError:
            return None


class Source(Struct, frozen=True, forbid_unknown_fields=True):
    """A declared source; an endpoint that is None is not offered."""

    title: str
    base_url: Annotated[str, Meta(pattern=r"^(https?://.+)?$")] = ""
    delay_s: Annotated[float, Meta(ge=0, le=86_400)] | None = None
    concurrency: Annotated[int, Meta(ge=0, le=1000)] | None = None
    user_apps: Endpoint | None = None
    app_sync: Endpoint | None = None
    data_sync: Endpoint | None = None


def at(value: Any, path: str) -> Any:
    """What lies at a dotted path such as "results.0.name"; None when there is nothing."""
    for step in path.split(".") if path else ():
        match value:
            case dict():
                value = value.get(step)
            case list() if step.isdigit() and int(step) < len(value):
                value = value[int(step)]
            case _:
                return None
    return value


def load_source(name: str, own_folder: Path | None = None) -> Source:
    """A source by name. Raises TaskRejected, naming what there is, or what is wrong with the file.

    own_folder: the operator's own sources; need not exist.
    """
    # The name came through NAME_PATTERN, so it cannot lead out of the folder.
    assert re.fullmatch(NAME_PATTERN.strip("^$"), name)
    folders = [SHIPPED] if own_folder is None else [own_folder, SHIPPED]
    for folder in folders:
        path = folder / f"{name}.toml"
        if path.is_file():
            return _parsed(path)
    known = sorted({path.stem for folder in folders for path in folder.glob("*.toml")})
    raise TaskRejected(f"no source {name!r}; this worker has: {', '.join(known)}")


def _parsed(path: Path) -> Source:
    try:
        with path.open("rb") as file:
            data = file.read(SOURCE_BYTES_MAX)
        return msgspec.toml.decode(data, type=Source)
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise TaskRejected(f"source file {path.name}: {error}") from None
