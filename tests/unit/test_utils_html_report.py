"""The page: whole, escaped, self-contained, and readable by a strict parser."""

from __future__ import annotations

import base64

import numpy as np
import pytest

from tests.html_pages import read
from utils.html_report import (
    Headline,
    Page,
    Picture,
    Section,
    Table,
    format_estimate,
    format_interval,
    format_number,
    library_versions,
    render_page,
)
from utils.plots import draw_confusion
from utils.statistics import Estimate

HOSTILE = ["<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "a & b < c", "' onload='",
           "{{ 7 * 7 }}", "スライド – ü", "</td></table>"]


def full_page(text: str, png: bytes = b"\x89PNG") -> Page:
    table = Table(columns=[text, "b"], rows=[(text, "1"), ("2", text)])
    picture = Picture(title=text, png=png, text=text)
    return Page(title=text, lead=text, headlines=[Headline(label=text, value=text, detail=text)],
                warnings=[text], sections=[
                    Section(title=text, paragraphs=[text], tables=[table], pictures=[picture]),
                    Section(title="closed", tables=[table], folded=True)])


@pytest.mark.parametrize("text", HOSTILE)
def test_every_text_is_escaped_and_shown(text: str) -> None:
    reader = read(render_page(full_page(text)))
    assert not {"script", "iframe", "object", "link", "form"} & set(reader.tags)
    assert reader.tags.count("img") == 1 and reader.tags.count("table") == 2
    assert not [name for name, _ in reader.attributes if name.startswith("on")]
    shown = "".join(reader.text)
    assert shown.count(text) == 17  # 16 places of full_page, and the title of the window
    assert ("alt", f"{text}. {text}") in reader.attributes


def test_nothing_is_fetched() -> None:
    html = render_page(full_page("plain"))
    reader = read(html)
    sources = [value for name, value in reader.attributes if name in ("src", "href", "action")]
    assert sources and all(value.startswith("data:image/png;base64,") for value in sources)
    assert "http:" not in html and "https:" not in html and "url(" not in html
    policy = [value for name, value in reader.attributes if value.startswith("default-src")]
    assert policy == ["default-src 'none'; img-src data:; style-src 'unsafe-inline'"]


def test_pictures_are_inside_byte_for_byte() -> None:
    png = draw_confusion(np.eye(2), ["a", "b"])
    reader = read(render_page(full_page("plain", png)))
    source = next(value for name, value in reader.attributes if name == "src")
    assert base64.b64decode(source.partition(",")[2]) == png


def test_folded_sections_are_closed_and_empty_parts_left_out() -> None:
    reader = read(render_page(full_page("plain")))
    assert reader.tags.count("details") == 1 and ("open", "") not in reader.attributes
    bare = read(render_page(Page(title="t", lead="l")))
    assert not {"ul", "table", "figure", "section"} & set(bare.tags)
    assert "lang" in dict(bare.attributes)


def test_tables_without_column_names_have_no_head() -> None:
    page = Page(title="t", lead="l", sections=[
        Section(title="s", tables=[Table(columns=["", ""], rows=[("a", "b")])])])
    assert "thead" not in read(render_page(page)).tags


def test_numbers() -> None:
    assert format_number(0.91249) == "0.912"
    assert format_number(float("nan")) == "—"
    assert format_interval(0.9, 0.8, 1.0) == "0.900 (0.800–1.000)"
    assert format_interval(0.9, float("nan"), float("nan")) == "0.900"
    assert format_interval(float("nan"), float("nan"), float("nan")) == "—"
    assert format_interval(-0.1, -0.25, 0.05) == "-0.100 (-0.250 to 0.050)"
    shown = format_estimate(Estimate(value=-0.1, low=-0.25, high=0.05))
    assert shown == "-0.100\n(-0.250 to 0.050)"


def test_versions_name_what_is_installed() -> None:
    versions = library_versions()
    assert versions["numpy"] == np.__version__ and versions["milwright"]
