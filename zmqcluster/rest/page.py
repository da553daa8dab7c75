"""/docs: the description of the API as one page of plain HTML, with nothing to fetch."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from hashlib import sha256
from html import escape
from typing import Any, Final

_STYLE: Final = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem }
h2 { margin: 2.5rem 0 .3rem; font-size: 1.1rem }
code, .path { font-family: ui-monospace, monospace }
.method { display: inline-block; min-width: 4.5rem; font-weight: 700 }
table { border-collapse: collapse; width: 100% }
td, th { text-align: left; padding: .15rem .6rem .15rem 0; border-bottom: 1px solid #8884 }
th { width: 13rem }
:root { color-scheme: light dark }
"""
# The page may use exactly this style, and no script, image, frame or address at all.
PAGE_POLICY: Final = (
    "default-src 'none'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'; "
    f"style-src 'sha256-{base64.b64encode(sha256(_STYLE.encode()).digest()).decode()}'"
)


def page(document: dict[str, Any]) -> str:
    """The page for an OpenAPI document as openapi.describe() makes it."""
    schemas = document["components"]["schemas"]
    operations = "".join(
        _operation(path, method, about)
        for path, methods in document["paths"].items()
        for method, about in methods.items()
    )
    shapes = "".join(_shape(name, schema) for name, schema in schemas.items())
    info = document["info"]
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f"<title>{escape(info['title'])} API</title><style>{_STYLE}</style></head><body>"
        f"<h1>{escape(info['title'])} {escape(info['version'])}</h1>"
        f"<p>{escape(info['description'])} For programs: "
        '<a href="/openapi.json">openapi.json</a>.</p>'
        f"{operations}<h1>Shapes</h1>{shapes}</body></html>\n"
    )


def _operation(path: str, method: str, about: dict[str, Any]) -> str:
    parts = [
        f'<h2><span class="method">{method.upper()}</span>'
        f'<span class="path">{escape(path)}</span></h2>',
        f"<p>{escape(about['summary'])} {escape(about.get('description', ''))}</p>",
    ]
    if {} not in about.get("security", [{}]):
        parts.append("<p>Needs the API token.</p>")
    rows = [(each["name"], each["schema"]) for each in about["parameters"]]
    if rows:
        parts.append(_table(rows))
    if "requestBody" in about:
        schema = about["requestBody"]["content"]["application/json"]["schema"]
        parts.append(f"<p>Takes {_kind(schema)}.</p>")
    for status, answer in about["responses"].items():
        for media_type, content in answer["content"].items():
            if status[0] == "2":
                kind = _kind(content["schema"])
                parts.append(f"<p>Gives {status}, {escape(media_type)}: {kind}.</p>")
    return "".join(parts)


def _shape(name: str, schema: dict[str, Any]) -> str:
    text = escape(schema.get("description", ""))
    fields = list(schema.get("properties", {}).items())
    return f'<h2 id="{escape(name)}"><code>{escape(name)}</code></h2><p>{text}</p>{_table(fields)}'


def _table(fields: list[tuple[str, dict[str, Any]]]) -> str:
    rows = "".join(
        f"<tr><th><code>{escape(name)}</code></th><td>{_kind(schema)}</td></tr>"
        for name, schema in fields
    )
    return f"<table>{rows}</table>"


def _kind(schema: dict[str, Any]) -> str:
    """A schema in a few words, links to shapes included."""
    return " ".join(_words(schema))


def _words(schema: dict[str, Any]) -> Iterator[str]:
    if "$ref" in schema:
        name = escape(schema["$ref"].rpartition("/")[2])
        yield f'<a href="#{name}">{name}</a>'
    elif "anyOf" in schema:
        yield " or ".join(_kind(each) for each in schema["anyOf"])
    elif "enum" in schema:
        yield "one of " + ", ".join(escape(str(each)) for each in schema["enum"])
    elif schema.get("type") == "array":
        yield f"list of {_kind(schema['items'])}" if "items" in schema else "list"
    else:
        yield escape(str(schema.get("type", "anything")))
    for key, words in _BOUNDS.items():
        if key in schema:
            yield f"{words} {escape(str(schema[key]))}"


_BOUNDS: Final = {
    "minimum": "from",
    "exclusiveMinimum": "above",
    "maximum": "up to",
    "maxLength": "of length up to",
    "maxItems": "of length up to",
    "pattern": "matching",
    "default": "default",
}
