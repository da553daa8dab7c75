"""Which character set a page is in, decided as browsers decide it."""

from __future__ import annotations

import codecs
import re
from typing import Final

# Labels of the WHATWG Encoding Standard that pages use, to Python codecs. Names outside of this
# table are ignored: Python would also take "rot13", "base64" or "unicode_escape" from a page.
_SINGLE: Final = {
    "cp1250": "windows-1250 cp1250 x-cp1250",
    "cp1251": "windows-1251 cp1251 x-cp1251",
    # Browsers read every one of these as windows-1252, and so do pages' authors.
    "cp1252": "windows-1252 cp1252 x-cp1252 ascii us-ascii ansi_x3.4-1968 iso-8859-1 iso8859-1 "
    "iso88591 iso_8859-1 iso_8859-1:1987 latin1 latin-1 l1 cp819 ibm819",
    "cp1253": "windows-1253 cp1253 x-cp1253",
    "cp1254": "windows-1254 cp1254 x-cp1254 iso-8859-9 iso8859-9 iso88599 iso_8859-9 latin5 l5",
    "cp1255": "windows-1255 cp1255 x-cp1255",
    "cp1256": "windows-1256 cp1256 x-cp1256",
    "cp1257": "windows-1257 cp1257 x-cp1257",
    "cp1258": "windows-1258 cp1258 x-cp1258",
    "iso8859-2": "iso-8859-2 iso8859-2 iso88592 iso_8859-2 latin2 l2",
    "iso8859-3": "iso-8859-3 iso8859-3 latin3 l3",
    "iso8859-4": "iso-8859-4 iso8859-4 latin4 l4",
    "iso8859-5": "iso-8859-5 iso8859-5 cyrillic",
    "iso8859-6": "iso-8859-6 iso8859-6 arabic",
    "iso8859-7": "iso-8859-7 iso8859-7 greek",
    "iso8859-8": "iso-8859-8 iso8859-8 iso-8859-8-i hebrew logical visual",
    "iso8859-10": "iso-8859-10 iso8859-10 latin6 l6",
    "iso8859-13": "iso-8859-13 iso8859-13",
    "iso8859-14": "iso-8859-14 iso8859-14",
    "iso8859-15": "iso-8859-15 iso8859-15 iso885915 latin9 l9",
    "iso8859-16": "iso-8859-16",
    "koi8-r": "koi8-r koi8 koi koi8_r cskoi8r",
    "koi8-u": "koi8-u koi8-ru",
    "mac-roman": "macintosh mac x-mac-roman",
    "mac-cyrillic": "x-mac-cyrillic x-mac-ukrainian",
    "cp874": "windows-874 tis-620 iso-8859-11 iso8859-11 dos-874",
    "cp866": "ibm866 cp866 866",
}
_MANY: Final = {
    "utf-8": "utf-8 utf8 unicode-1-1-utf-8 x-unicode20utf8",
    "gb18030": "gb18030 gbk gb2312 gb_2312-80 chinese x-gbk csgb2312",
    "big5hkscs": "big5 big5-hkscs cn-big5 x-x-big5 csbig5",
    "euc_jp": "euc-jp x-euc-jp cseucpkdfmtjapanese",
    "iso2022_jp": "iso-2022-jp csiso2022jp",
    "cp932": "shift_jis shift-jis sjis ms_kanji ms932 windows-31j x-sjis csshiftjis",
    "cp949": "euc-kr korean ks_c_5601-1987 ks_c_5601-1989 ksc5601 ksc_5601 windows-949 cseuckr",
    "utf-16-le": "utf-16 utf-16le unicode ucs-2 csunicode iso-10646-ucs-2",
    "utf-16-be": "utf-16be unicodefffe",
}
_CODEC_OF: Final[dict[str, str]] = {
    label: codec for table in (_SINGLE, _MANY) for codec, labels in table.items()
    for label in labels.split()
}  # fmt: skip

_BYTE_ORDER_MARKS: Final = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)

# The standard looks for <meta charset> in the first 1,024 bytes.
PRESCAN_BYTES: Final = 1024
_META_CHARSET: Final = re.compile(
    rb"<meta\b[^>]{0,512}?\bcharset\s*=\s*[\"']?\s*([A-Za-z0-9_.:-]{1,40})", re.IGNORECASE
)


def codec_for(label: str) -> str:
    """The Python codec of a page's charset label, or "" for one no browser knows."""
    return _CODEC_OF.get(label.strip(" \t\r\n\f\"'").lower(), "")


def as_utf8(body: bytes, header_charset: str) -> bytes:
    """The body in UTF-8, which is what the parser reads; broken bytes become U+FFFD.

    header_charset: the charset parameter of Content-Type, or "".
    """
    for mark, codec in _BYTE_ORDER_MARKS:
        if body.startswith(mark):
            return _recode(body[len(mark) :], codec)
    return _recode(body, codec_for(header_charset) or _declared(body) or _guessed(body))


def _declared(body: bytes) -> str:
    found = _META_CHARSET.search(body, 0, PRESCAN_BYTES)
    codec = codec_for(found[1].decode("ascii")) if found else ""
    # A page that could be read this far to say "UTF-16" is not in UTF-16.
    return "utf-8" if codec.startswith("utf-16") else codec


def _guessed(body: bytes) -> str:
    """Nothing said: UTF-8 when it is valid, else the fallback of western browsers."""
    try:
        body.decode("utf-8")
    except UnicodeDecodeError:
        return "cp1252"
    return "utf-8"


def _recode(body: bytes, codec: str) -> bytes:
    text = body.decode(codec, "replace")
    # ASCII and clean UTF-8 come out as they went in; that is the usual page.
    return body if codec == "utf-8" and "\ufffd" not in text else text.encode("utf-8", "replace")
