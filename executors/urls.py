"""URLs as the crawler keeps them: one spelling each, joined fast, and inside a scope or not.

The canonical form is the WHATWG one (what a browser's address bar holds) without fragment and
without credentials. It is the unique key of a crawl task, so two spellings of one page meet here.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from enum import StrEnum
from functools import lru_cache
from typing import Final, NamedTuple

import ada_url

from zmqcluster.model import RATE_KEY_CHARS_MAX, UNIQUE_KEY_CHARS_MAX

URL_CHARS_MAX: Final = UNIQUE_KEY_CHARS_MAX

# Joined links are remembered: 86-94 % of the links of a real site were seen before, and a hit
# costs a tenth of a join. Dropped as a whole when full, which keeps a hit at two dict look-ups.
MEMO_LINKS_MAX: Final = 100_000

# Links a browser would follow only on a click by hand, or not at all, are told apart without a
# parser: a scheme other than http(s) in front.
_OTHER_SCHEME: Final = re.compile(r"\s*(?!https?:)[A-Za-z][A-Za-z0-9+.-]*:", re.IGNORECASE)
_LONE_PERCENT: Final = re.compile(r"%(?![0-9A-Fa-f]{2})")


class BadUrl(ValueError):
    """Not an http(s) URL we would fetch; the text says what is wrong with it."""


class ScopeKind(StrEnum):
    """How far from its seed a crawl goes."""

    PAGE = "page"
    PREFIX = "prefix"
    HOST = "host"
    DOMAIN = "domain"


class Target(NamedTuple):
    """A canonical URL in the parts the crawler asks for.

    origin: scheme://host[:port], the rate key. site: host[:port] without scheme; a port is there
    only when it is not the scheme's own, so http and https of one host are one site.
    """

    url: str
    origin: str
    site: str

    @property
    def path(self) -> str:
        """Path and query, as they go into a request line."""
        return self.url[len(self.origin) :]

    @property
    def host(self) -> str:
        """The site without a port; an IPv6 host keeps its brackets."""
        name, colon, port = self.site.rpartition(":")
        return name if colon and port.isdigit() else self.site


@lru_cache(maxsize=16_384)
def canonical(url: str) -> Target:
    """Bring a URL into its one form.

    Raises BadUrl: not http(s), no host, not a URL at all, or longer than URL_CHARS_MAX.
    """
    return _target(url.partition("#")[0], None)


def _target(reference: str, base: str | None) -> Target:
    if len(reference) > URL_CHARS_MAX:
        raise BadUrl(f"longer than {URL_CHARS_MAX} characters")
    try:
        href = ada_url.join_url(base, reference) if base else ada_url.normalize_url(reference)
    except ValueError:
        raise BadUrl("not a URL") from None
    if not href.startswith(("http://", "https://")):
        raise BadUrl("only http and https are fetched")
    if "@" in href[: href.find("/", 8)]:
        # Credentials in links are phishing or leaks; secrets never travel in a task.
        href = ada_url.replace_url(href, username="", password="")
    # "https://" is 8 long and "http://h" too: the first slash from there on ends the origin.
    origin = href[: href.find("/", 8)]
    if len(href) > URL_CHARS_MAX or len(origin) > RATE_KEY_CHARS_MAX:
        raise BadUrl(f"longer than {URL_CHARS_MAX} characters, or its host is too long")
    return Target(href, origin, origin.partition("://")[2])


def join(base: str, reference: str) -> Target:
    """A reference as seen from a canonical base URL. Raises BadUrl."""
    return _target(reference.partition("#")[0], base)


def for_request(url: str) -> str:
    """Escape what WHATWG leaves alone and servers refuse: a % that starts no escape."""
    return _LONE_PERCENT.sub("%25", url) if "%" in url else url


class LinkJoiner:
    """Turns the references of a page into targets, remembering what it joined before.

    One lives in each executor host and is used from one thread only.
    """

    def __init__(self, links_max: int = MEMO_LINKS_MAX) -> None:
        self._links_max = links_max
        self._links = 0
        # By folder of the base URL, then by reference: pages of one folder share their answers.
        self._memo: dict[str, dict[str, Target | None]] = {}

    def join_all(self, base: str, references: list[str]) -> list[Target]:
        """Every distinct http(s) target in order of appearance; the rest is left out.

        base: canonical URL of the page, or of its <base href>.
        """
        known = self._folder(base)
        found: dict[str, Target] = {}
        for reference in references:
            bare = reference.partition("#")[0] if "#" in reference else reference
            if not bare:
                continue
            try:
                target = known[bare]
            except KeyError:
                target = self._join(known, base, bare)
            if target is not None:
                found[target.url] = target
        return list(found.values())

    def _folder(self, base: str) -> dict[str, Target | None]:
        if self._links > self._links_max:
            self._memo.clear()
            self._links = 0
        path, _, _ = base.partition("?")
        return self._memo.setdefault(path[: path.rindex("/") + 1], {})

    def _join(self, known: dict[str, Target | None], base: str, bare: str) -> Target | None:
        target = None
        if not _OTHER_SCHEME.match(bare):
            try:
                target = _target(bare, base)
            except BadUrl:
                target = None
        # "?page=2" hangs on the page's own name, not on its folder. Blanks in front are dropped
        # by the join, so "  ?x" is one too.
        if not bare.lstrip().startswith("?"):
            known[bare] = target
            self._links += 1
        return target


class Scope:
    """Which targets belong to a crawl that began at base. admits(target): is it inside?"""

    def __init__(self, kind: ScopeKind, base: str) -> None:
        self.kind = kind
        self.seed = canonical(base)
        # Chosen once, as it is asked for every link of every page.
        self.admits: Callable[[Target], bool] = {
            ScopeKind.PAGE: self._is_seed,
            ScopeKind.PREFIX: _prefix_test(self.seed),
            ScopeKind.HOST: _host_test(self.seed),
            ScopeKind.DOMAIN: _domain_test(self.seed),
        }[kind]

    def _is_seed(self, target: Target) -> bool:
        return target.url == self.seed.url


def _host_test(seed: Target) -> Callable[[Target], bool]:
    site = seed.site
    return lambda target: target.site == site


def _prefix_test(seed: Target) -> Callable[[Target], bool]:
    site = seed.site
    path = seed.path.partition("?")[0]
    folder = path[: path.rindex("/") + 1]
    if folder == "/":
        return _host_test(seed)
    return lambda target: target.site == site and target.url.startswith(folder, len(target.origin))


def _domain_test(seed: Target) -> Callable[[Target], bool]:
    domain = seed.host.removeprefix("www.")
    if _is_literal(domain):
        return lambda target: target.host == domain
    below = "." + domain
    return lambda target: target.host == domain or target.host.endswith(below)


def _is_literal(host: str) -> bool:
    """An address has no hosts below it; "9.10.0.0.1" is not even a valid name."""
    return host.startswith("[") or host.rpartition(".")[2].isdigit()


@lru_cache(maxsize=1024)
def scope_of(kind: ScopeKind, base: str) -> Scope:
    """The scope object for these two words, kept: every page of a crawl asks for the same one."""
    return Scope(kind, base)
