"""A report that a person opens: one self-contained HTML page, nothing fetched, nothing run.

Style sheet and pictures lie inside the page, every text is escaped (slide names come from
tables and file systems), and the page's own policy forbids scripts and requests.
"""

from __future__ import annotations

import base64
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from utils import __version__

if TYPE_CHECKING:
    from utils.statistics import Estimate

_WORD_JOINER = "\u2060"
_TEMPLATES = Path(__file__).parent / "templates"
_LIBRARIES = ("torch", "numpy", "pandas", "scipy", "scikit-learn", "scikit-survival", "matplotlib",
              "h5py")


@dataclass(frozen=True, kw_only=True)
class Headline:
    """A figure shown large: ``label``, ``value`` and below it ``detail`` (its interval)."""

    label: str
    value: str
    detail: str = ""


@dataclass(frozen=True, kw_only=True)
class Table:
    """Rows of text below column names; each row has as many cells as there are columns."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True, kw_only=True)
class Picture:
    """PNG bytes with a title and a text that says what they show."""

    title: str
    png: bytes
    text: str = ""

    @property
    def source(self) -> str:
        """The picture as a data address."""
        return "data:image/png;base64," + base64.b64encode(self.png).decode("ascii")


@dataclass(frozen=True, kw_only=True)
class Section:
    """A heading, paragraphs, then tables, then pictures side by side.

    ``folded`` sections (settings) are closed until clicked.
    """

    title: str
    paragraphs: Sequence[str] = ()
    tables: Sequence[Table] = ()
    pictures: Sequence[Picture] = ()
    folded: bool = False


@dataclass(frozen=True, kw_only=True)
class Page:
    """A whole report. ``warnings`` stand in a box at the top."""

    title: str
    lead: str
    headlines: Sequence[Headline] = ()
    warnings: Sequence[str] = ()
    sections: Sequence[Section] = ()


def render_page(page: Page) -> str:
    """The page as HTML text (UTF-8 when written)."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES), autoescape=True,
        undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.get_template("report.html.j2").render(page=page, version=__version__)


def library_versions() -> dict[str, str]:
    """Versions of this toolkit, Python and the libraries that results depend on."""
    versions = {"milwright": __version__, "python": platform.python_version()}
    for name in _LIBRARIES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return versions


def format_number(value: float) -> str:
    """``0.912``, or an em dash for NaN."""
    return "—" if value != value else f"{value:.3f}"


def format_interval(value: float, low: float, high: float) -> str:
    """``0.912 (0.850–0.961)``; without the bracket when there is no interval."""
    span = "" if low != low or high != high else f" ({format_span(low, high)})"
    return format_number(value) + span


def format_span(low: float, high: float) -> str:
    """``0.850–0.961``, or ``-0.2 to 0.1`` where a sign would run into the dash."""
    return f"{low:.3f}{'–' if low >= 0 else ' to '}{high:.3f}"


def format_estimate(item: Estimate) -> str:
    """The interval on an unbroken line of its own: seven figures fit side by side."""
    text = format_interval(item.value, item.low, item.high)
    return text.replace(" ", "\n", 1).replace("–", f"{_WORD_JOINER}–{_WORD_JOINER}")
