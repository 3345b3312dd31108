"""Whatever a card or a report shows is text there: no HTML, no Markdown, no key of its header, no end of a table."""

import html.parser
import json
import re

import pytest
import yaml
from huggingface_hub import ModelCard
from PIL import Image

from diffusers_eqvae.hub import prepare_push
from diffusers_eqvae.inspection.card import pyplot, write_html, write_png
from diffusers_eqvae.inspection.health import inspect_autoencoder
from diffusers_eqvae.model_card import RunMetadata, render_model_card
from diffusers_eqvae.templates import code, fenced, literal, markdown, render_template

HOSTILE = {
    "an element": "<img src=x onerror=alert(1)>",
    "an element after a code span": "x`<img src=x onerror=alert(1)>`",
    "an element after a block": "x\n```\n<script>alert(1)</script>\n```",
    "an element after a longer block": "x\n``````\n<script>alert(1)</script>",
    "a link": "[x](javascript:alert)",
    "an image": "![x](https://tracker.example/x.png)",
    "an address": "https://tracker.example/x",
    "a cell": "a | b |\n| c | d",
    "a heading": "x\n# Licence: MIT",
    "a header": "x\n---\nlicense: mit\n---\n",
    "a template": "{{ 7 * 7 }}{% for x in [1] %}",
    "an entity": "&lt;b&gt;",
    "emphasis": "*x* __y__ ~~z~~",
    "the other direction": "abc\u202etxt.exe",
    "a line of another kind": "x\u2028# y\x0b# z",
    "mathematics": r"$\frac{$",
    "quotes": "\"'); import os; os.system('x'",
}
ALLOWED = {"code"}


class Elements(html.parser.HTMLParser):
    """The elements that a Markdown reader would pass on as HTML: those outside code."""

    def __init__(self, card):
        super().__init__(convert_charrefs=False)
        self.found = set()
        self.feed(without_code(card))

    def handle_starttag(self, tag, attributes):
        self.found.add(tag)


def without_code(card):
    """A card without its blocks and spans of code."""
    text = re.sub(r"^(`{3,})[a-z]*\n.*?\n\1$", "", card, flags=re.M | re.S)
    return re.sub(r"(?<![\\`])(`+)(?!`).*?(?<!`)\1(?!`)", "", text)


def everywhere(text):
    """Metadata with the text wherever free text may stand."""
    return RunMetadata(
        model={"base_model": text, "autoencoder": text, "architecture": text, "license": text, "name": text}
        | {"labels": [text, text], "num_classes": 2, "sampling": {"scale": text}, "padding_mode": text}
        | {"normalization": {"mean": [0.5], text: text}, "papers": [{"name": text, "arxiv": text}]},
        training={"losses": {text: 1.0}, "regularizers": {text: {text: text}}, text: text},
        data={"dataset": text, text: text},
        evaluation={
            "metrics": [{"name": text, "value": text, "how": text, "before": text}],
            "images": [{"path": text, "caption": text}],
        },
        provenance={"command": text, "hardware": text, "versions": {text: text}},
    )


@pytest.mark.parametrize("kind", ["autoencoder", "pipeline"])
@pytest.mark.parametrize("case", HOSTILE)
def test_a_value_is_only_a_value_on_the_card(case, kind):
    text = HOSTILE[case]
    plain = render_model_card(everywhere("plain"), kind, files=["plain"])
    card = render_model_card(everywhere(text), kind, files=[text])
    header = ModelCard(card).data.to_dict()
    assert header.keys() - {"base_model", "datasets"} == ModelCard(plain).data.to_dict().keys()
    assert header["license"] == " ".join(text.split()) or header["license"] == text
    body, expected = (each.split("\n---\n", 1)[1] for each in (card, plain))
    assert Elements(body).found <= ALLOWED, without_code(body)
    assert "49" not in body
    assert headings(body) == headings(expected)
    for line in without_code(body).split("\n"):  # every row has as many cells as its table
        if line.startswith("| ") and not line.startswith("| ---"):
            assert len(re.findall(r"(?<!\\)\|", line)) in (3, 5), line
    assert not re.search(r"(?<!\\)\]\((javascript|https?://tracker)", without_code(body))
    assert "\u202e" not in body


def headings(body):
    lines = re.split(r"[\n\r\x0b\x0c\x85\u2028\u2029]", without_code(body))
    return [line.split()[0] for line in lines if line.startswith("#")]


@pytest.mark.parametrize("case", HOSTILE)
def test_the_code_on_a_card_is_python_that_says_the_value(case):
    card = render_model_card(everywhere(HOSTILE[case]), "pipeline", repo_id=HOSTILE[case])
    block = re.search(r"^pipeline = .*?\(class_labels=\[(.*)\], scale=(.*)\)\.images$", card, flags=re.M | re.S)
    assert json.loads(re.sub(r"\\x(..)", r"\\u00\1", block[2])) == HOSTILE[case]
    for lines in re.findall(r"^```python\n(.*?)\n```$", card, flags=re.M | re.S):
        compile(lines, "card", "exec")


@pytest.mark.parametrize("names", [{"class": "X\n```"}, {"class": "A;B"}, {"sampling": {"x=1, y": 2}}], ids=str)
def test_names_in_code_are_names(names):
    with pytest.raises(ValueError, match="Names of classes and arguments in RunMetadata are Python's"):
        RunMetadata(model=names)


def test_a_class_folder_is_only_text_on_a_pushed_card(tmp_path, tiny_sit, tiny_autoencoder_kl):
    from diffusers_eqvae import ClassConditionalPipeline, FlowMatchODEScheduler

    names = dict(enumerate(HOSTILE.values()))
    labels = {key: names[key] for key in range(tiny_sit.config.num_classes)}
    pipeline = ClassConditionalPipeline(tiny_sit, tiny_autoencoder_kl, FlowMatchODEScheduler(), id2label=labels)
    pipeline.save_pretrained(tmp_path)
    _, card = prepare_push(tmp_path, "me/x")
    assert Elements(card).found <= ALLOWED and "<script" not in card


@pytest.mark.parametrize("case", HOSTILE)
def test_reports_escape_what_they_show(case, tmp_path, tiny_autoencoder_kl):
    import torch

    pytest.importorskip("matplotlib")
    text = HOSTILE[case]
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    inspection = inspect_autoencoder(tiny_autoencoder_kl, images, name=text)
    write_html(tmp_path / "card.html", [inspection], {"data": text, text: text})
    page = (tmp_path / "card.html").read_text(encoding="utf-8")
    report = render_template(
        "demo_report.html",
        title=text,
        verdict=[text],
        steps=text,
        rows=[(text,) * 5],
        figures=dict.fromkeys(("comparison.png", "samples.png", "curves.png"), text),
        commands=[(text, 1.0, text)],
        seconds=1.0,
        app=text,
        attribution=text,
    )
    for each in (page, report):
        found = Elements(each).found
        assert not found & {"script", "b"} and "onerror" not in each.replace("onerror=alert(1)&gt;", "")
    if case in ("mathematics", "an element"):
        tile = [[[(Image.new("RGB", (8, 8)), "")]]]
        write_png(tmp_path / "card.png", [inspection], tiles(tile))
        assert (tmp_path / "card.png").stat().st_size > 0
    pyplot().close("all")


def tiles(tile):
    from diffusers_eqvae.inspection.card import COLUMNS, Tile

    return [[[Tile(*tile[0][0][0])] * len(COLUMNS)]]


def test_what_the_filters_make():
    assert str(markdown("a_b *c* <d> | -1")) == r"a_b \*c\* &lt;d&gt; \| -1"
    assert str(code("otter, river otter")) == "`otter, river otter`"
    assert str(code("a`b")) == r"<code>a\`b</code>"
    assert str(fenced("x\n```\ny")) == "````\nx\n```\ny\n````"
    assert str(literal("it's <b>")) == r'"it\'s \x3cb>"'.replace("\\'", "'")


def test_a_licence_is_one_line_of_the_header():
    card = render_model_card(RunMetadata(model={"license": "mit\n---\nfoo: bar"}), "autoencoder")
    assert "foo" not in yaml.safe_load(card.split("---\n")[1])
