"""The Jinja templates of model cards, health cards and the demo's report.

They are the repository's model_cards/; a wheel carries them as diffusers_eqvae/model_cards/. Whatever a template fills
in is escaped for where it stands: in .html by Jinja, in .md as Markdown text by `markdown`, unless a filter has made
something else of it (`code`, `link`, `literal`, `fenced`).
"""

from __future__ import annotations

import html
import json
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import quote

import jinja2
from markupsafe import Markup

FOLDERS = (Path(__file__).parent / "model_cards", Path(__file__).parents[2] / "model_cards")
# What turns the order of the characters around it: text that reads otherwise than it is.
_DIRECTIONS = re.compile("[\u202a-\u202e\u2066-\u2069]")


def render_template(template: str, /, **values: Any) -> str:
    """A file of model_cards/ filled in, with every value escaped; one that the template misses is an error.

    Example:
        >>> render_template("page.html", title="a & b").count("a &amp; b")
        2
    """
    return _environment(Path(template).suffix).get_template(template).render(**values)


@cache
def _environment(suffix: str) -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(FOLDERS),
        autoescape=suffix == ".html",
        finalize=markdown if suffix == ".md" else None,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"cell": cell, "label": lambda key: key.replace("_", " "), "quote": quote}
    environment.filters |= {"code": code, "fenced": fenced, "link": link, "literal": literal}
    return environment


def markdown(value: Any) -> Markup:
    """A value as text of one line: nothing in it is Markdown or HTML, and it cannot end a table's cell.

    Example:
        >>> markdown("<b> *x* | y")
        Markup('&lt;b&gt; \\\\*x\\\\* \\\\| y')
    """
    if isinstance(value, Markup):
        return value
    text = html.escape(_one_line(value), quote=False)
    text = re.sub(r"([\\\\`*\[\]|$~])|(?<![^\W_])(_)|(_)(?![^\W_])", r"\\\g<0>", text)
    text = re.sub(r"^(\s*)([-+=#!](?!\d))", r"\1\\\2", text)
    return Markup(text.replace("://", "&#58;//"))  # nor an address that becomes a link by itself


def _one_line(value: Any) -> str:
    return re.sub(r"\s+", " ", re.sub("[\x00-\x08\x0e-\x1b]", "", _DIRECTIONS.sub("", str(value))))


def code(value: Any) -> Markup:
    """A value in a code span of Markdown; where it could end the span, in an element with everything escaped."""
    text = _one_line(value)
    return Markup(
        f"<code>{markdown(text)}</code>" if re.search(r"[`<>&|\\]", text) or not text.strip() else f"`{text}`"
    )


def fenced(text: str) -> Markup:
    """Lines in a code block of Markdown whose fence is longer than any in them."""
    fence = "`" * max([3, *(len(run) + 1 for run in re.findall("`+", text))])
    return Markup(f"{fence}\n{_DIRECTIONS.sub('', text)}\n{fence}")


def literal(value: Any) -> Markup:
    """A value as Python writes it, in one line and without the signs that end a block or begin an element."""
    text = json.dumps(value, ensure_ascii=False) if isinstance(value, str) else repr(value)
    text = _DIRECTIONS.sub(lambda found: f"\\u{ord(found[0]):04x}", text)
    return Markup(text.replace("<", "\\x3c").replace("`", "\\x60").replace("&", "\\x26"))


def cell(value: Any) -> str:
    """A value in words, with floats to six significant digits.

    Example:
        >>> cell({"l1": 1.0, "equivariance": {"p": 0.5}})
        'l1 1, equivariance (p 0.5)'
    """
    if isinstance(value, Mapping):
        pairs = ((key, f"({cell(each)})" if isinstance(each, Mapping) else cell(each)) for key, each in value.items())
        return ", ".join(f"{key} {text}" if text != "()" else str(key) for key, text in pairs)
    if isinstance(value, list | tuple):
        return ", ".join(map(cell, value))
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def is_hub_id(source: str) -> bool:
    """Whether a name has the form owner/name."""
    return re.fullmatch(r"\w[\w.-]*/[\w.-]+", source, re.ASCII) is not None


def link(source: str, prefix: str = "") -> Markup:
    """A link to a Hub id; of a local path only the last part, because the rest means nothing elsewhere."""
    if is_hub_id(source):
        return Markup(f"[{markdown(source)}](https://huggingface.co/{prefix}{source})")
    return code(Path(source).name)
