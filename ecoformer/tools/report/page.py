"""Write a page of one file: no script, nothing from elsewhere, light or dark as the reader likes.

It is XML as well as HTML, so that any parser can check it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape

from ecoformer.tools.table import Column, Row

_STYLE = """
:root { color-scheme: light dark; --page: #fff; --ink: #1c1e21; --line: #d0d4da; --card: #f6f7f9; }
@media (prefers-color-scheme: dark) {
  :root { --page: #15171a; --ink: #e4e6ea; --line: #3a3f46; --card: #1d2024; }
}
body { margin: 2rem auto; max-width: 76rem; padding: 0 1rem; background: var(--page);
  color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin-top: 2.5rem; }
figure { margin: 1rem 0; padding: .5rem; background: var(--card); border-radius: 6px; }
figure svg { display: block; max-width: 100%; height: auto; margin: auto; }
figcaption, .note { font-size: .875rem; opacity: .85; max-width: 60rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .875rem; }
th, td { padding: .3rem .6rem; border-bottom: 1px solid var(--line); text-align: left;
  vertical-align: bottom; }
th.number, td.number { text-align: right; font-variant-numeric: tabular-nums; }
"""


@dataclass(frozen=True)
class Picture:
    """A picture as SVG, and what it shows, in a sentence."""

    svg: str
    caption: str


@dataclass(frozen=True)
class Section:
    """A part of the page.

    Args:
        table: columns and rows.
        notes: what a reader has to know.
    """

    title: str
    pictures: Sequence[Picture] = ()
    table: tuple[Sequence[Column], Sequence[Row]] | None = None
    notes: Sequence[str] = field(default_factory=list)


def format_page(title: str, sections: Sequence[Section]) -> str:
    """Write the whole page."""
    body = "\n".join(_format_section(section) for section in sections)
    # Pictures may be of the page itself, and nothing else is loaded.
    policy = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    return f"""<!DOCTYPE html>
<html lang="en" xmlns="http://www.w3.org/1999/xhtml">
<head>
<meta charset="utf-8" />
<meta http-equiv="Content-Security-Policy" content="{policy}" />
<meta name="viewport" content="width=device-width, initial-scale=1" />
<link rel="icon" href="data:," />
<title>{escape(title)}</title>
<style>{_STYLE}</style>
</head>
<body>
<h1>{escape(title)}</h1>
{body}
</body>
</html>
"""


def _format_section(section: Section) -> str:
    parts = [f"<h2>{escape(section.title)}</h2>"]
    if section.table:
        parts.append(f'<div class="wide">{_format_table(*section.table)}</div>')
    for picture in section.pictures:
        caption = escape(picture.caption)
        parts.append(f"<figure>\n{picture.svg}\n<figcaption>{caption}</figcaption>\n</figure>")
    parts += [f'<p class="note">{escape(note)}</p>' for note in section.notes]
    return "<section>\n" + "\n".join(parts) + "\n</section>"


def _format_table(columns: Sequence[Column], rows: Sequence[Row]) -> str:
    """Write rows; empty columns are left out."""
    shown = [column for column in columns if any(column.format(row) for row in rows)]
    kinds = [' class="number"' if column.holds_numbers(rows) else "" for column in shown]

    def line(tag: str, texts: Sequence[str]) -> str:
        cells = (
            f"<{tag}{kind}>{escape(text)}</{tag}>" for kind, text in zip(kinds, texts, strict=True)
        )
        return f"<tr>{''.join(cells)}</tr>"

    head = line("th", [column.title for column in shown])
    body = "\n".join(line("td", [column.format(row) for column in shown]) for row in rows)
    return f"<table>\n<thead>{head}</thead>\n<tbody>\n{body}\n</tbody>\n</table>"
