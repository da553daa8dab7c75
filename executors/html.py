"""What the crawler reads off a page: title, text length, links, and what its author asked for."""

from __future__ import annotations

from typing import Final

from msgspec import Struct
from selectolax.lexbor import LexborHTMLParser, LexborNode

from executors.charset import as_utf8

TITLE_CHARS_MAX: Final = 512
ATTRIBUTE_CHARS_MAX: Final = 2048
# Several times what one result can carry as children; a page of 8 MiB can hold 600,000.
LINKS_MAX: Final = 50_000

# One pass over the tree in document order; <base> and <title> win by coming first. Each selector
# more costs 0.5 µs a kilobyte of page, so two attributes stand for eight kinds of element.
_WANTED: Final = "[href],[src],meta,title,script,style"
_UNSEEN: Final = "script,style"


class Page(Struct, frozen=True, gc=False):
    """A page as read. links: references as written, in order, repeats left in; links_cut: how many
    after the first LINKS_MAX were left out.

    text_chars: of the text people see. base: <base href> as written, or "". links_nofollow: how
    many links were left out because they say rel=nofollow. nofollow, noindex: meta robots.
    """

    title: str = ""
    text_chars: int = 0
    language: str = ""
    canonical: str = ""
    base: str = ""
    nofollow: bool = False
    noindex: bool = False
    links_nofollow: int = 0
    links_cut: int = 0
    links: list[str] = []


def read_page(body: bytes, header_charset: str = "", *, follow_nofollow: bool = False) -> Page:
    """Parse HTML as a browser would: never an error, whatever the bytes.

    Takes about 120 µs for 16 kB. A page made of nothing but open tags takes time in the square
    of its size (1 MB of <div>: 86 s), so callers bound the size: see parser.py.
    """
    tree = LexborHTMLParser(as_utf8(body, header_charset))
    gathered = _Gathered(follow_nofollow)
    add_link = gathered.links.append
    for node in tree.css(_WANTED):
        attributes = node.attributes
        # Nearly all of them are plain links, so these have the short way.
        if node.tag == "a" and "rel" not in attributes:
            add_link(attributes.get("href") or "")
        else:
            gathered.take(node, attributes)
    root = tree.root
    language = (root.attributes.get("lang") or "") if root is not None else ""
    return Page(
        title=gathered.title,
        text_chars=_text_chars(tree, gathered.unseen_chars),
        language=language[:35],
        canonical=gathered.canonical,
        base=gathered.base,
        nofollow=gathered.nofollow,
        noindex=gathered.noindex,
        links_nofollow=gathered.links_nofollow,
        links_cut=max(0, len(gathered.links) - LINKS_MAX),
        links=gathered.links[:LINKS_MAX],
    )


def _text_chars(tree: LexborHTMLParser, unseen_chars: int) -> int:
    """Length of the body's text without scripts and styles; unseen_chars: theirs on the page.

    Subtracting is cheaper than cutting them out of the tree.
    """
    if tree.body is None:
        return 0
    if tree.head is not None:
        unseen_chars -= sum(len(node.text_lexbor()) for node in tree.head.css(_UNSEEN))
    return max(0, len(tree.body.text_lexbor()) - unseen_chars)


class _Gathered:
    """Collects one page's facts node by node."""

    def __init__(self, follow_nofollow: bool) -> None:
        self._follow_nofollow = follow_nofollow
        self._titled = False
        self.title = ""
        self.canonical = ""
        self.base = ""
        self.nofollow = False
        self.noindex = False
        self.links_nofollow = 0
        self.unseen_chars = 0
        self.links: list[str] = []

    def take(self, node: LexborNode, attributes: dict[str, str | None]) -> None:
        match node.tag:
            case "a" | "area" if "href" in attributes:
                self._link(attributes)
            case "link" if "href" in attributes:
                self._relation(attributes)
            case "frame" | "iframe" if "src" in attributes:
                self.links.append(attributes["src"] or "")
            case "base" if "href" in attributes:
                self.base = self.base or (attributes["href"] or "")[:ATTRIBUTE_CHARS_MAX]
            case "script" | "style":
                self.unseen_chars += len(node.text_lexbor())
            case "meta":
                self._meta(attributes)
            case "title":
                self._title(node)

    def _link(self, attributes: dict[str, str | None]) -> None:
        relation = attributes.get("rel")
        if relation and not self._follow_nofollow and "nofollow" in relation.lower().split():
            self.links_nofollow += 1
        else:
            self.links.append(attributes["href"] or "")

    def _relation(self, attributes: dict[str, str | None]) -> None:
        relations = (attributes.get("rel") or "").lower().split()
        if "canonical" in relations:
            self.canonical = (attributes["href"] or "")[:ATTRIBUTE_CHARS_MAX]
        elif "next" in relations or "prev" in relations:
            self.links.append(attributes["href"] or "")

    def _meta(self, attributes: dict[str, str | None]) -> None:
        if (attributes.get("name") or "").lower() not in ("robots", "zmqcluster"):
            return
        words = (attributes.get("content") or "").lower().replace(",", " ").split()
        self.nofollow |= "nofollow" in words or "none" in words
        self.noindex |= "noindex" in words or "none" in words

    def _title(self, node: LexborNode) -> None:
        # An <svg> further down may have a <title> too; the document's comes first.
        if not self._titled:
            self._titled = True
            self.title = " ".join(node.text_lexbor().split())[:TITLE_CHARS_MAX]
