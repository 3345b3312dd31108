"""The Jinja templates of model cards, health cards and the demo's report.

They are the repository's model_cards/; a wheel carries them as diffusers_eqvae/model_cards/.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import jinja2

FOLDERS = (Path(__file__).parent / "model_cards", Path(__file__).parents[2] / "model_cards")


def render_template(template: str, /, **values: Any) -> str:
    """A file of model_cards/ filled in; .html is escaped, and a value that a template misses is an error.

    Example:
        >>> render_template("page.html", title="a & b").count("a &amp; b")
        2
    """
    return _environment().get_template(template).render(**values)


@cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(FOLDERS),
        autoescape=jinja2.select_autoescape(["html"]),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"cell": cell, "link": link, "label": lambda key: key.replace("_", " ")}
    return environment


def cell(value: Any) -> str:
    """A value as one cell of a Markdown table, with floats to six significant digits.

    Example:
        >>> cell({"l1": 1.0, "equivariance": {"p": 0.5}})
        'l1 1, equivariance (p 0.5)'
    """
    if isinstance(value, Mapping):
        pairs = ((key, f"({cell(each)})" if isinstance(each, Mapping) else cell(each)) for key, each in value.items())
        return ", ".join(f"{key} {text}" if text != "()" else key for key, text in pairs)
    if isinstance(value, list | tuple):
        return ", ".join(map(cell, value))
    text = f"{value:.6g}" if isinstance(value, float) else str(value)
    return text.replace("\n", " ").replace("|", "\\|")


def is_hub_id(source: str) -> bool:
    """Whether a name has the form owner/name."""
    return re.fullmatch(r"[\w][\w.-]*/[\w.-]+", source) is not None


def link(source: str, prefix: str = "") -> str:
    """A link to a Hub id; of a local path only the last part, because the rest means nothing elsewhere."""
    return f"[{source}](https://huggingface.co/{prefix}{source})" if is_hub_id(source) else f"`{Path(source).name}`"
