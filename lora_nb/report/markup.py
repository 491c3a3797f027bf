"""The pieces that HTML pages of runs are made of: text, tables, figures, pictures, the page and its style."""

import base64
import html
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from lora_nb import plots

THUMBNAIL = 192  # longest side of an embedded sample in pixels


def text(value: Any) -> str:
    """Any value as text that cannot break the page."""
    return html.escape(str(value))


def plain(value: Any) -> str:
    """A setting in words."""
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return "default" if value is None else str(value)


def section(title: str, body: str) -> str:
    return f"<section><h2>{text(title)}</h2>{body}</section>"


def table(rows: Mapping[str, Any], columns: Sequence[str] = ()) -> str:
    """A row for each name; with columns named, a value is a sequence of as many."""
    heads = "".join(f"<th scope=col>{text(column)}</th>" for column in columns)
    lines = [f"<tr><td></td>{heads}</tr>"] if columns else []
    for name, value in rows.items():
        values = value if columns else (value,)
        cells = "".join(f"<td>{text(plain(v))}</td>" for v in values)
        lines.append(f"<tr><th scope=row>{text(name)}</th>{cells}</tr>")
    return f"<div class=wide><table>{''.join(lines)}</table></div>"


def figure(drawn: Any, caption: str) -> str:
    """A figure of `plots` as a picture inside the page."""
    picture = base64.b64encode(drawn.png()).decode()
    width = int(drawn.get_size_inches()[0] * plots.PIXELS_PER_INCH)
    image = (
        f'<img src="data:image/png;base64,{picture}" alt="{text(caption)}" style="width:{width}px">'
    )
    return f"<figure>{image}<figcaption>{text(caption)}</figcaption></figure>"


def strip(prompts: Sequence[str], rows: Mapping[str, Sequence[Path]]) -> str:
    """Pictures in a table: a column, or several of equal number, for each prompt, a row for each label."""
    each = max(map(len, rows.values())) // len(prompts)
    heads = "".join(f"<th scope=colgroup colspan={each}>{text(prompt)}</th>" for prompt in prompts)
    lines = [f"<tr><td></td>{heads}</tr>"]
    for label, files in rows.items():
        cells = "".join(
            f'<td><img src="{thumbnail(file)}" alt="{text(f"{prompts[i // each]}, {label}")}"></td>'
            for i, file in enumerate(files)
        )
        lines.append(f"<tr><th scope=row>{text(label)}</th>{cells}</tr>")
    # Wide enough to see something, narrow enough that some columns fit the page; more of them scroll.
    side = max(6, min(10, 50 // max(map(len, rows.values()))))
    return f'<div class=wide><table class=strip style="--side:{side}rem">{"".join(lines)}</table></div>'


def thumbnail(file: Path) -> str:
    """A picture file as a data URL, at most THUMBNAIL pixels wide and high."""
    picture = Image.open(file).convert("RGB")
    picture.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    picture.save(buffer, format="WEBP", quality=90)
    return f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}"


STYLE = """
:root { color-scheme: light dark;
  --ink: #222; --soft: #5c5c5c; --line: #ddd; --page: #fdfdfc; --card: #f4f4f1; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e6e3; --soft: #a9a9a5; --line: #3a3a38; --page: #1b1b1a; --card: #262625; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 60rem; padding: 2.5rem 1.25rem 5rem;
  background: var(--page); color: var(--ink); font: 1rem/1.55 system-ui, sans-serif; }
h1 { margin: 0; font-size: 1.7rem; }
h2 { margin: 2.5rem 0 .7rem; font-size: 1.15rem; }
.lead { margin: .3rem 0 1.4rem; color: var(--soft); }
.result { margin: 0; padding: .9rem 1.1rem; background: var(--card);
  border-left: 4px solid #0072b2; font-size: 1.08rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .92rem; }
th, td { padding: .3rem .9rem .3rem 0; border-bottom: 1px solid var(--line);
  text-align: left; vertical-align: top; }
th { font-weight: 500; color: var(--soft); }
td { overflow-wrap: anywhere; }
.strip th, .strip td { padding: .15rem; border: 0; vertical-align: middle; }
.strip th[scope=row] { padding-right: .8rem; white-space: nowrap; }
.strip th[scope=colgroup] { width: var(--side); font-size: .8rem; line-height: 1.25; vertical-align: bottom; }
.strip img { display: block; width: var(--side); max-width: none; border-radius: 3px; }
figure { margin: 0 0 1.2rem; }
figure img { max-width: 100%; height: auto; background: #fff; border-radius: 4px; }
figcaption, section > p { color: var(--soft); font-size: .88rem; }
pre { margin: 0; padding: .9rem 1.1rem; overflow-x: auto; background: var(--card);
  border-radius: 4px; font-size: .88rem; }
details { margin-top: .8rem; }
summary { cursor: pointer; color: var(--soft); }
details > :last-child { margin-top: .6rem; }
"""
PAGE = """<!DOCTYPE html>
<html lang=en>
<head>
<meta charset=utf-8>
<meta name=viewport content="width=device-width, initial-scale=1">
<meta name=color-scheme content="light dark">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
{body}
</body>
</html>
"""
