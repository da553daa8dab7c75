"""Canonical URLs, joining and scopes."""

from __future__ import annotations

import pytest

from executors.urls import (
    BadUrl,
    LinkJoiner,
    Scope,
    ScopeKind,
    canonical,
    for_request,
    join,
)


@pytest.mark.parametrize(
    ("written", "kept"),
    [
        ("http://example.com", "http://example.com/"),
        ("HTTP://EXAMPLE.com:80/", "http://example.com/"),
        ("https://example.com:443/a", "https://example.com/a"),
        ("http://example.com:8080/a", "http://example.com:8080/a"),
        ("http://example.com/a#part", "http://example.com/a"),
        ("http://example.com/a?#", "http://example.com/a?"),
        ("http://example.com/a/./b/../c", "http://example.com/a/c"),
        ("http://example.com/%7Euser/ä", "http://example.com/%7Euser/%C3%A4"),
        ("http://münchen.example/", "http://xn--mnchen-3ya.example/"),
        ("http://example.com\\a\\b", "http://example.com/a/b"),
        (" \thttp://exam\nple.com/x ", "http://example.com/x"),
        ("http://user:secret@example.com/x", "http://example.com/x"),
        ("http://2130706433/", "http://127.0.0.1/"),
        ("http://0x7f.1/", "http://127.0.0.1/"),
        ("http://0177.0.0.1/", "http://127.0.0.1/"),
        ("http://[::FFFF:127.0.0.1]/", "http://[::ffff:7f00:1]/"),
        ("http://example.com/100%", "http://example.com/100%"),
        ("http:example.com/x", "http://example.com/x"),
    ],
)
def test_every_spelling_of_a_url_has_one_form(written: str, kept: str) -> None:
    assert canonical(written).url == kept
    assert canonical(kept).url == kept


@pytest.mark.parametrize(
    "written",
    [
        "",
        "example.com/a",
        "ftp://example.com/",
        "file:///etc/passwd",
        "javascript:alert(1)",
        "data:text/html,x",
        "http://",
        "http://exa mple.com/",
        "http://example.com:99999/",
        "http://999.999.999.999/",
        "http://example.com/" + "a" * 2048,
        "http://" + "a" * 400 + ".example/",
        "http://example.com/\ud800",
    ],
)
def test_what_is_no_http_url_is_refused(written: str) -> None:
    with pytest.raises(BadUrl):
        canonical(written)


def test_a_target_knows_its_rate_key_and_site() -> None:
    target = canonical("https://Example.com:8443/a/b?c=d")

    assert (target.origin, target.site, target.host) == (
        "https://example.com:8443",
        "example.com:8443",
        "example.com",
    )
    assert target.path == "/a/b?c=d"
    assert canonical("http://[::1]/").host == "[::1]"
    assert canonical("http://[::1]:81/").host == "[::1]"


@pytest.mark.parametrize(
    ("reference", "joined"),
    [
        ("c.html", "http://h.example/a/c.html"),
        ("./c.html#x", "http://h.example/a/c.html"),
        ("../c.html", "http://h.example/c.html"),
        ("/c", "http://h.example/c"),
        ("//other.example/c", "http://other.example/c"),
        ("https://other.example", "https://other.example/"),
        ("?page=2", "http://h.example/a/b.html?page=2"),
        (" ?page=2", "http://h.example/a/b.html?page=2"),
        ("", None),
        ("#top", None),
        ("mailto:a@b.example", None),
        ("javascript:void(0)", None),
        ("JavaScript:void(0)", None),
        ("java\nscript:void(0)", None),
        ("tel:123", None),
        ("ftp://h.example/x", None),
        ("http://[bad", None),
    ],
)
def test_references_join_as_in_a_browser(reference: str, joined: str | None) -> None:
    joiner = LinkJoiner()
    for _ in range(2):  # The second time comes from the memo.
        found = joiner.join_all("http://h.example/a/b.html?q=1", [reference])
        assert [target.url for target in found] == ([joined] if joined else [])


def test_the_memo_never_mixes_up_pages_of_one_folder() -> None:
    joiner = LinkJoiner()

    first = joiner.join_all("http://h.example/a/one.html", ["?p=2", "x"])
    second = joiner.join_all("http://h.example/a/two.html", ["?p=2", "x"])

    assert [target.path for target in first] == ["/a/one.html?p=2", "/a/x"]
    assert [target.path for target in second] == ["/a/two.html?p=2", "/a/x"]


def test_links_are_deduplicated_in_order_of_appearance() -> None:
    found = LinkJoiner().join_all("http://h.example/", ["b", "a", "b#2", "./a", "c"])

    assert [target.path for target in found] == ["/b", "/a", "/c"]


def test_the_memo_is_bounded() -> None:
    joiner = LinkJoiner(links_max=10)

    for page in range(50):
        joiner.join_all(f"http://h.example/{page}/", ["a", "b", "c"])

    assert sum(map(len, joiner._memo.values())) <= 13


@pytest.mark.parametrize(
    ("kind", "base", "inside", "outside"),
    [
        (
            ScopeKind.PAGE,
            "http://h.example/a",
            ["http://h.example/a"],
            ["http://h.example/a?x", "http://h.example/b", "https://h.example/a"],
        ),
        (
            ScopeKind.PREFIX,
            "http://h.example/docs/index.html?x=/y/",
            ["http://h.example/docs/", "http://h.example/docs/a/b", "https://h.example/docs/c"],
            ["http://h.example/docs", "http://h.example/docsx/", "http://h.example:81/docs/a"],
        ),
        (
            ScopeKind.HOST,
            "http://h.example:81/docs/",
            ["http://h.example:81/", "http://h.example:81/x?y"],
            ["http://h.example/", "http://www.h.example:81/", "http://h.example.org:81/"],
        ),
        (
            ScopeKind.DOMAIN,
            "http://www.h.example/",
            ["http://h.example/", "https://a.b.h.example:444/x", "http://www.h.example/"],
            ["http://xh.example/", "http://example/", "http://h.example.org/"],
        ),
        (ScopeKind.DOMAIN, "http://10.0.0.1/", ["http://10.0.0.1:81/"], ["http://0.0.0.1/"]),
    ],
)
def test_scopes(kind: ScopeKind, base: str, inside: list[str], outside: list[str]) -> None:
    scope = Scope(kind, base)

    assert [url for url in inside if not scope.admits(canonical(url))] == []
    assert [url for url in outside if scope.admits(canonical(url))] == []


def test_a_redirect_target_is_joined_the_same_way() -> None:
    assert join("http://h.example/a/b", "c#d").url == "http://h.example/a/c"
    with pytest.raises(BadUrl, match="only http and https"):
        join("http://h.example/", "file:///etc/passwd")


def test_a_percent_that_escapes_nothing_is_escaped_for_the_wire() -> None:
    assert for_request("http://h.example/5%/%41%zz?%") == "http://h.example/5%25/%41%25zz?%25"
