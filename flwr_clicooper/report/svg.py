"""The few SVG elements of a picture, with everything that came from elsewhere escaped."""

from __future__ import annotations

import html
import unicodedata

from flwr_clicooper.provenance.checking import Outcome, shown

CLASSES: dict[Outcome, str] = {"passed": "ok", "failed": "bad", "not checked": "open"}
_ICONS: dict[Outcome, str] = {
    "passed": "m-4 0 3 3 5-6",
    "failed": "m-3.5-3.5 7 7m0-7-7 7",
    "not checked": "m-2.2-1.6a2.2 2.2 0 1 1 3.2 2q-1 .5-1 1.6m0 2.6v.2",
}


def escaped(value: object) -> str:
    """Return a text as HTML and XML may hold it, and as people may see it."""
    return html.escape(shown(str(value)))


def cut(text: str, most: int) -> str:
    """Return a text with a place for at most so many letters; wide letters take two."""
    width = 0
    for place, letter in enumerate(text):
        width += 2 if unicodedata.east_asian_width(letter) in "WF" else 1
        if width > most:
            return text[: max(place - 1, 0)] + "…"
    return text


def count(number: float) -> str:
    """Return a number that may be large in at most seven characters."""
    for size, unit in ((10**15, "P"), (10**12, "T"), (10**9, "G"), (10**6, "M")):
        if number >= size:
            value = number / size
            return f"{value:,.0f} {unit}" if value >= 1000 else f"{value:.3g} {unit}"
    return f"{number:,.0f}"


def seconds(value: float) -> str:
    """Return a duration in at most seven characters."""
    if value < 100:
        return f"{value:.3g} s"
    return f"{value / 60:.3g} min" if value < 6000 else f"{count(value / 3600)} h"


def text(x: float, y: float, value: object, kind: str = "") -> str:
    """Return a line of text."""
    name = f' class="{kind}"' if kind else ""
    return f'<text x="{x:g}" y="{y:g}"{name}>{escaped(value)}</text>'


def box(x: float, y: float, width: float, height: float, kind: str, radius: int = 7) -> str:
    """Return a rectangle."""
    return (
        f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="{radius}" '
        f'class="{kind}"/>'
    )


def path(data: str, kind: str) -> str:
    """Return a line."""
    return f'<path d="{data}" class="{kind}"/>'


def icon(x: float, y: float, state: Outcome) -> str:
    """Return the sign of an outcome."""
    kind = CLASSES[state]
    return (
        f'<circle cx="{x:g}" cy="{y:g}" r="8" class="dot {kind}"/>'
        f'<path d="M{x:g} {y:g}{_ICONS[state]}" class="sign"/>'
    )


def card(x: float, y: float, width: float, height: float, state: Outcome) -> str:
    """Return the frame of a statement, with a stripe and a sign of its outcome."""
    kind = CLASSES[state]
    return (
        box(x, y, width, height, f"card {kind}")
        + path(f"M{x + 4:g} {y + 9:g}v{height - 18:g}", f"stripe {kind}")
        + icon(x + width - 15, y + 16, state)
    )


def titled(title: str, content: str, target: str = "") -> str:
    """Return a group with what it says on hovering; it may lead to a place on the page."""
    inside = f"<title>{title}</title>{content}"
    return f'<a href="#{target}">{inside}</a>' if target else f"<g>{inside}</g>"
