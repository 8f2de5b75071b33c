"""Pages that are rendered as Markdown with separate pictures, and as self-contained HTML."""

from __future__ import annotations

import io
from base64 import b64encode
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_prune.reporting.grid import Grid

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Bullets", "Code", "Heading", "Page", "Paragraph", "Part", "Picture", "Row", "html_of"]

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1b1f24; max-width: 76rem; margin: 2rem auto; padding: 0 1.25rem; }
h1 { font-size: 1.7rem; line-height: 1.2; } h2 { font-size: 1.25rem; margin-top: 2.2rem; }
.table { overflow-x: auto; margin: 1.2rem 0; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; padding: .3rem 0; } td { white-space: nowrap; } th, td { padding: .28rem .7rem; }
thead th { vertical-align: bottom; border-bottom: 2px solid #1b1f24; } tbody tr { border-bottom: 1px solid #e2e5e9; }
.row { display: grid; gap: 0 1.5rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 22rem), 1fr)); }
pre { overflow-x: auto; background: #f6f8fa; padding: .8rem; font-size: .85rem; }
figure { margin: 1.6rem 0; } img { max-width: 100%; height: auto; }
figcaption, small { color: #57606a; font-size: .9rem; }
@media (max-width: 40rem) { th, td { padding: .28rem .35rem; } td:first-child { white-space: normal; } }
"""


@dataclass(frozen=True)
class Heading:
    """Heading of a section."""

    text: str


@dataclass(frozen=True)
class Paragraph:
    """Plain text."""

    text: str


@dataclass(frozen=True)
class Bullets:
    """A bulleted list."""

    items: tuple[str, ...]


@dataclass(frozen=True)
class Code:
    """Preformatted text.

    Attributes:
        text: The text.
        language: Language for syntax highlighting, such as ``"json"``.
    """

    text: str
    language: str = ""


@dataclass(frozen=True)
class Picture:
    """A figure.

    Attributes:
        name: File name, without the suffix.
        caption: Caption.
        png: The image.
    """

    name: str
    caption: str
    png: bytes

    @classmethod
    def of(cls, name: str, caption: str, figure: Figure) -> Picture:
        """Create a picture from a matplotlib figure."""
        image = io.BytesIO()
        figure.savefig(image, format="png")
        return cls(name, caption, image.getvalue())


@dataclass(frozen=True)
class Row:
    """Pictures next to each other if there is room, otherwise below each other."""

    pictures: tuple[Picture, ...]


Part = Heading | Paragraph | Bullets | Code | Grid | Picture | Row


@dataclass(frozen=True)
class Page:
    """A page to be read in a browser or in a repository.

    Attributes:
        title: Heading of the page.
        parts: Text, tables and pictures in order.
    """

    title: str
    parts: tuple[Part, ...]

    @property
    def pictures(self) -> Sequence[Picture]:
        """The pictures on the page."""
        found = [part.pictures if isinstance(part, Row) else (part,) for part in self.parts]
        return [part for parts in found for part in parts if isinstance(part, Picture)]

    def markdown(self) -> str:
        """GitHub's Markdown; a picture is a link to ``<name>.png``."""
        return "\n\n".join([f"# {self.title}", *(_markdown(part) for part in self.parts)]) + "\n"

    def html(self) -> str:
        """Self-contained HTML."""
        body = "\n".join(html_of(part) for part in self.parts)
        title = escape(self.title)
        return (
            f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{title}</title>\n'
            f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<style>{_STYLE}</style>\n</head>\n'
            f"<body>\n<h1>{title}</h1>\n{body}\n</body>\n</html>\n"
        )

    def write(self, folder: Path, name: str) -> tuple[Path, Path]:
        """Write ``<name>.md`` with its pictures, and ``<name>.html``; returns both files."""
        folder.mkdir(parents=True, exist_ok=True)
        for picture in self.pictures:
            (folder / f"{picture.name}.png").write_bytes(picture.png)
        markdown, html = folder / f"{name}.md", folder / f"{name}.html"
        markdown.write_text(self.markdown(), encoding="utf-8")
        html.write_text(self.html(), encoding="utf-8")
        return markdown, html


def _markdown(part: object) -> str:
    match part:
        case Heading(text):
            return f"## {text}"
        case Paragraph(text):
            return text
        case Bullets(items):
            return "\n".join(f"- {item}" for item in items)
        case Code(text, language):
            return f"```{language}\n{text}\n```"
        case Row(pictures):
            return "\n\n".join(map(_markdown, pictures))
        case Picture(name, caption, _):
            return f"![{caption}]({name}.png)\n\n{caption}"
        case Grid():
            return part.markdown()
    raise TypeError(f"expected a part of a page, got {part!r}")


def html_of(part: object) -> str:
    """HTML of a single part of a page, for a notebook."""
    match part:
        case Heading(text):
            return f"<h2>{escape(text)}</h2>"
        case Paragraph(text):
            return f"<p>{escape(text)}</p>"
        case Bullets(items):
            return f"<ul>{''.join(f'<li>{escape(item)}</li>' for item in items)}</ul>"
        case Code(text, _):
            return f"<pre>{escape(text)}</pre>"
        case Row(pictures):
            return f'<div class="row">{"".join(map(html_of, pictures))}</div>'
        case Picture(_, caption, png):
            source = f"data:image/png;base64,{b64encode(png).decode()}"
            text = escape(caption)
            return f'<figure><img src="{source}" alt="{text}"><figcaption>{text}</figcaption></figure>'
        case Grid():
            return f'<div class="table">{part.html()}</div>'
    raise TypeError(f"expected a part of a page, got {part!r}")
