"""robots.txt as RFC 9309 wants it read."""

from __future__ import annotations

import pytest

from executors.robots import CRAWL_DELAY_MAX_S, Rules
from executors.urls import canonical


def allowed(text: str, path: str) -> bool:
    return Rules(text).allow(canonical("http://h.example" + path))


@pytest.mark.parametrize(
    ("text", "path", "is_allowed"),
    [
        ("", "/a", True),
        ("User-agent: *\nDisallow: /", "/a", False),
        ("User-agent: *\nDisallow:", "/a", True),
        ("User-agent: otherbot\nDisallow: /", "/a", True),
        ("User-agent: zmqcluster\nDisallow: /", "/a", False),
        ("user-agent: ZMQcluster\ndisallow: /", "/a", False),
        # Our own group wins over the one for everybody, wherever it stands.
        ("User-agent: *\nDisallow: /\n\nUser-agent: zmqcluster\nAllow: /", "/a", True),
        ("User-agent: zmqcluster\nDisallow: /x\n\nUser-agent: *\nDisallow: /", "/a", True),
        # Groups of one name are one group.
        ("User-agent: zmqcluster\nDisallow: /a\n\nUser-agent: zmqcluster\nAllow: /b", "/a", False),
        ("User-agent: a\nUser-agent: zmqcluster\nDisallow: /a", "/a", False),
        # The longest match wins; allow wins when both are as long.
        ("User-agent: *\nDisallow: /a\nAllow: /a/b", "/a/b/c", True),
        ("User-agent: *\nAllow: /a\nDisallow: /a/b", "/a/b/c", False),
        ("User-agent: *\nDisallow: /a\nAllow: /a", "/a", True),
        ("User-agent: *\nDisallow: /a", "/A", True),
        ("User-agent: *\nDisallow: /*.php$", "/x/y.php", False),
        ("User-agent: *\nDisallow: /*.php$", "/x/y.php?z", True),
        ("User-agent: *\nDisallow: /a?b", "/a?bc", False),
        ("User-agent: *\nDisallow: /a?b=https://c.example", "/a?b=https://c.example", False),
        ("User-agent: *\nDisallow: /ä", "/%C3%A4", False),
        ("User-agent: *\nDisallow: /%61", "/a", False),
        ("User-agent: *\nDisallow: /a # why\n", "/a", False),
        ("Disallow: /a", "/a", True),
        ("User-agent: *\r\nDisallow: /a\r\n", "/a", False),
        ("\ufeffnot\x00 a robots file <html>", "/a", True),
    ],
)  # fmt: skip
def test_rules(text: str, path: str, is_allowed: bool) -> None:
    assert allowed(text, path) is is_allowed


def test_hostile_patterns_are_matched_in_no_time() -> None:
    text = "User-agent: *\nDisallow: /" + "*a" * 2000 + "b$"

    assert allowed(text, "/" + "a" * 1900)


@pytest.mark.parametrize(
    ("value", "delay_s"),
    [("2", 2.0), ("0.5", 0.5), ("x", 0.0), ("-1", 0.0), ("inf", 0.0), ("86400", CRAWL_DELAY_MAX_S)],
)
def test_crawl_delay_is_read_and_capped(value: str, delay_s: float) -> None:
    assert Rules(f"User-agent: *\nCrawl-delay: {value}").crawl_delay_s == delay_s


def test_no_file_means_no_rules() -> None:
    assert Rules().allow(canonical("http://h.example/a"))
    assert Rules().crawl_delay_s == 0.0
