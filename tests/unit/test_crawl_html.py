"""What is read off a page, in which character set, and for how long at most."""

from __future__ import annotations

import asyncio
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from executors.charset import as_utf8, codec_for
from executors.html import LINKS_MAX, read_page
from executors.parser import INLINE_BYTES_MAX, PageParser, Unparseable
from tests.support.web_site import run


def test_a_page_gives_its_title_text_language_and_links() -> None:
    page = read_page(
        b"<!doctype html><html lang=de><head><title> A \n &amp; B </title>"
        b"<style>p{}</style></head><body><p>Gr&uuml;n</p><script>var x</script>"
        b"<style>q{}</style><img src=i><template><a href=t>t</a></template>"
        b"<svg><title>not this</title></svg><a href='/x?a=1&amp;b=2'>x</a></body></html>"
    )

    assert (page.title, page.language) == ("A & B", "de")
    assert page.text_chars == len("Gr\u00fcn" + "not this" + "x")
    assert page.links == ["/x?a=1&b=2"]


def test_links_come_from_everything_a_browser_opens_as_a_page() -> None:
    page = read_page(
        b"<link rel=next href=n><link rel=stylesheet href=s.css><link rel='prev nofollow' href=p>"
        b"<a href=a>a</a><a name=x>x</a><a href>e</a><map><area href=b></map>"
        b"<iframe src=f></iframe><img src=i>"
    )

    assert page.links == ["n", "p", "a", "", "b", "f"]


def test_the_first_base_and_the_canonical_link_are_kept() -> None:
    page = read_page(b"<base href=/one/><base href=/two/><link rel=canonical href=/c>")

    assert (page.base, page.canonical) == ("/one/", "/c")


@pytest.mark.parametrize(
    ("meta", "nofollow", "noindex"),
    [
        ("<meta name=robots content='noindex, nofollow'>", True, True),
        ("<meta name=ROBOTS content=NONE>", True, True),
        ("<meta name=robots content='nofollow'>", True, False),
        ("<meta name=zmqcluster content=noindex>", False, True),
        ("<meta name=otherbot content=none>", False, False),
        ("<meta name=robots>", False, False),
        ("<meta name=description content='nofollow'>", False, False),
    ],
)
def test_meta_robots(meta: str, nofollow: bool, noindex: bool) -> None:
    page = read_page(meta.encode())

    assert (page.nofollow, page.noindex) == (nofollow, noindex)


def test_nofollow_links_are_left_out_and_counted_unless_asked_for() -> None:
    body = b"<a href=a rel='external NOFOLLOW'>a</a><a href=b rel=nofollower>b</a>"

    assert (read_page(body).links, read_page(body).links_nofollow) == (["b"], 1)
    assert read_page(body, follow_nofollow=True).links == ["a", "b"]


@pytest.mark.parametrize(
    ("body", "header", "text"),
    [
        ("ä€".encode(), "", "ä€"),
        ("ä€".encode(), "utf-8", "ä€"),
        ("ä".encode("latin-1"), "iso-8859-1", "ä"),
        ("€".encode("cp1252"), "ISO-8859-1", "€"),  # Browsers mean windows-1252.
        ("ä".encode("latin-1"), "", "ä"),  # Not UTF-8, so the western fallback.
        ("ж".encode("koi8-r"), "KOI8-R", "ж"),
        ("日本".encode("cp932"), "Shift_JIS", "日本"),
        ("한".encode("cp949"), "euc-kr", "한"),
        ("中".encode("gbk"), "gb2312", "中"),
        (b"\xef\xbb\xbf" + "ä".encode(), "iso-8859-1", "ä"),  # The mark beats the header.
        ("\ufeffä".encode("utf-16-le"), "", "ä"),
        ("\ufeffä".encode("utf-16-be"), "utf-8", "ä"),
        (b"a\xffb", "utf-8", "a\ufffdb"),
        ("ä".encode(), "rot13", "ä"),  # Not a character set, whatever Python says.
        ("ä".encode(), "unicode_escape", "ä"),
    ],
)
def test_character_sets_are_found_as_browsers_find_them(
    body: bytes, header: str, text: str
) -> None:
    assert as_utf8(body, header).decode() == text


def test_meta_declares_the_character_set_when_the_header_does_not() -> None:
    body = "<meta charset=koi8-r><title>ж</title>".encode("koi8-r")
    old = b"<meta http-equiv=content-type content='text/html; charset=windows-1251'><title>\xe6"

    assert read_page(body).title == "ж"
    assert read_page(old).title == "ж"
    assert read_page(body, "utf-8").title == "\ufffd"
    # Whoever can be read far enough to say UTF-16 is in UTF-8 (so says the standard).
    assert read_page("<meta charset=utf-16><title>ж".encode()).title == "ж"


def test_unknown_labels_are_no_codecs() -> None:
    assert [codec_for(label) for label in ("base64", "hex", "idna", "", "utf-7")] == [""] * 5


@given(st.binary(max_size=400), st.sampled_from(["", "utf-8", "shift_jis", "utf-16", "x"]))
def test_no_bytes_make_the_reader_fail(body: bytes, charset: str) -> None:
    for wrapped in (body, b'<a href="' + body + b'"><title>' + body):
        page = read_page(wrapped, charset)
        assert all(isinstance(link, str) for link in page.links)


def test_large_pages_are_read_in_the_helper_with_the_same_result() -> None:
    body = b"<title>big</title>" + b"<p>x</p><a href=/a>a</a>" * 4000

    async def both() -> None:
        parser = PageParser()
        try:
            assert len(body) > INLINE_BYTES_MAX
            assert await parser.parse(body, "", False) == read_page(body)
            helper = parser._helper
            assert helper is not None
            await parser.parse(body, "", True)
            assert parser._helper is helper  # Kept for the next page.
        finally:
            await parser.close()
        assert helper.returncode is not None

    run(both())


def test_a_page_that_takes_the_parser_for_ever_costs_its_deadline() -> None:
    bomb = b"<div>" * 200_000  # 86 s in the parser.

    async def bombed() -> None:
        parser = PageParser(deadline_s=1.0)
        try:
            began = time.monotonic()
            beats = 0
            asking = asyncio.ensure_future(parser.parse(bomb, "", False))
            while not asking.done():
                await asyncio.wait([asking], timeout=0.05)
                beats += 1
            with pytest.raises(Unparseable, match="more than 1 s"):
                asking.result()
            assert time.monotonic() - began < 3
            assert beats > 5  # The loop went on meanwhile.
            # And the next large page finds a fresh helper.
            page = await parser.parse(b"<title>ok</title>" + b"<p>x" * 20_000, "", False)
            assert page.title == "ok"
        finally:
            await parser.close()

    run(bombed())


def test_a_parser_helper_that_dies_costs_one_page() -> None:
    body = b"<title>ok</title>" + b"<p>x</p>" * 10_000

    async def killed() -> None:
        parser = PageParser()
        try:
            await parser.parse(body, "", False)
            helper = parser._helper
            assert helper is not None
            helper.kill()
            await helper.wait()
            assert (await parser.parse(body, "", False)).title == "ok"
        finally:
            await parser.close()

    run(killed())


def test_the_worst_page_read_in_the_loop_is_over_soon() -> None:
    began = time.process_time()

    read_page((b"<div>" * INLINE_BYTES_MAX)[:INLINE_BYTES_MAX])

    assert time.process_time() - began < 2.0  # 0.1 s measured; the bound is for slow machines.


def test_links_beyond_the_bound_are_counted_and_not_kept() -> None:
    page = read_page(b"<a href=x>" * (LINKS_MAX + 3))

    assert (len(page.links), page.links_cut) == (LINKS_MAX, 3)
