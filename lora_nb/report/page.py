"""report.html: one page that needs nothing from outside, light or dark as the reader's system is."""

import base64
import html
import io
from pathlib import Path
from typing import Any

from PIL import Image

from lora_nb import plots
from lora_nb.files import write_atomically
from lora_nb.redaction import redacted
from lora_nb.report.facts import Run, public, versions

FILE = "report.html"
THUMBNAIL = 192  # longest side of an embedded sample in pixels
ROWS, COLUMNS = 6, 8  # at most so many sample sets and pictures of each


def write_report(folder: str | Path) -> Path:
    """Write report.html: result, samples, curves, settings, data and licence, cost, and how to load the adapter.

    One file that needs nothing from outside. Raises CheckpointError if the folder holds no run.
    """
    run = Run.read(folder)
    body = "\n".join(
        (
            f"<h1>{_text(run.name)}</h1>\n<p class=lead>{_text(run.what())}</p>",
            f"<p class=result>{_text(run.result())}</p>",
            _samples_section(run),
            _curves_section(run),
            _section("Settings", _settings(run)),
            _section("Data and licences", _data(run)),
            _section("Cost and versions", _table(run.cost() | versions())),
            _section("Load it", f"<pre><code>{_text(run.snippet())}</code></pre>"),
        )
    )
    page = PAGE.format(title=_text(run.name), style=STYLE, body=body)
    return write_atomically(run.folder / FILE, redacted(page))


def _samples_section(run: Run) -> str:
    """A strip: rows are the base model and the steps, columns are prompts with their seeds."""
    if not run.samples:
        return ""
    prompts = run.config.validation_prompts[:COLUMNS]
    seeds = min(run.seeds, max(1, COLUMNS // len(prompts)))
    heads = "".join(
        f"<th scope=colgroup colspan={seeds}>{_text(prompt)}</th>" for prompt in prompts
    )
    rows = [f"<tr><td></td>{heads}</tr>"]
    for label in _spread(list(run.samples), ROWS):
        files = run.samples[label]
        pictures = "".join(
            f'<td><img src="{_thumbnail(file)}" alt="{_text(f"{prompt}, {label}")}"></td>'
            for p, prompt in enumerate(prompts)
            for file in files[p * run.seeds : p * run.seeds + seeds]
        )
        rows.append(f"<tr><th scope=row>{_text(label)}</th>{pictures}</tr>")
    note = "Each column keeps its prompt and seed; the first row is the base model without the adapter."
    strip = f"<div class=wide><table class=strip>{''.join(rows)}</table></div>"
    return _section("Samples", f"{strip}<p>{note}</p>")


def _spread(labels: list[str], most: int) -> list[str]:
    """At most so many labels, evenly spaced, with the first and the last."""
    if len(labels) <= most:
        return labels
    return [labels[round(i * (len(labels) - 1) / (most - 1))] for i in range(most)]


def _thumbnail(file: Path) -> str:
    picture = Image.open(file).convert("RGB")
    picture.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    picture.save(buffer, format="WEBP", quality=90)
    return f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _curves_section(run: Run) -> str:
    if not run.events("step"):
        return ""
    parts = [
        _figure(
            plots.training_figure(run.history),
            "Loss, held-out difference and learning rate over the steps",
        )
    ]
    probes = [probe for probe in run.events("probe") if probe["step"] > 0]
    if probes:
        parts.append(
            _figure(plots.probe_by_timestep(probes[-1]["by_timestep"]), "Held-out loss by timestep")
        )
    return _section("Curves", "".join(parts))


def _figure(figure: Any, caption: str) -> str:
    picture = base64.b64encode(figure.png()).decode()
    width = int(figure.get_size_inches()[0] * plots.PIXELS_PER_INCH)
    image = f'<img src="data:image/png;base64,{picture}" alt="{_text(caption)}" style="width:{width}px">'
    return f"<figure>{image}<figcaption>{_text(caption)}</figcaption></figure>"


def _settings(run: Run) -> str:
    everything = {}
    for name, value in _flat(run.config.to_dict()).items():
        everything[name] = public(value) if isinstance(value, str) and "/" in value else value
    return f"{_table(run.settings())}<details><summary>All settings</summary>{_table(everything)}</details>"


def _data(run: Run) -> str:
    rows = {
        "pictures": f"{run.start.get('pictures', 'unknown')} from {run.data}",
        "fingerprint (sha256 of pictures and captions)": run.start.get("fingerprint", "unknown"),
        "words that end every caption": run.trigger() or "none",
        "licence of the pictures": run.data_licence.stated,
        "base model": run.base,
        "licence of the base model": run.base_licence.stated,
    }
    texts = (("pictures", run.data_licence.text), ("base model", run.base_licence.text))
    details = "".join(
        f"<details><summary>Licence text of the {of}</summary><pre>{_text(text)}</pre></details>"
        for of, text in texts
        if text
    )
    return _table(rows) + details


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for name, value in values.items():
        out |= (
            _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
        )
    return out


def _table(rows: dict[str, Any]) -> str:
    lines = (
        f"<tr><th scope=row>{_text(k)}</th><td>{_text(_plain(v))}</td></tr>"
        for k, v in rows.items()
    )
    return f"<div class=wide><table>{''.join(lines)}</table></div>"


def _plain(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return "default" if value is None else str(value)


def _section(title: str, body: str) -> str:
    return f"<section><h2>{_text(title)}</h2>{body}</section>"


def _text(value: Any) -> str:
    return html.escape(str(value))


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
.strip th[scope=colgroup] { font-size: .8rem; line-height: 1.25; vertical-align: bottom; }
.strip img { display: block; width: 100%; min-width: 5.5rem; border-radius: 3px; }
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
