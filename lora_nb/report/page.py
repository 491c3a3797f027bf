"""report.html: one page that needs nothing from outside, light or dark as the reader's system is."""

from pathlib import Path

from lora_nb import inference, plots
from lora_nb.config import flat
from lora_nb.errors import CheckpointError, ModelError
from lora_nb.files import write_atomically
from lora_nb.formats import FILE_NAME
from lora_nb.redaction import redacted, shown
from lora_nb.report import markup
from lora_nb.report.facts import Run, versions

FILE = "report.html"
ROWS, COLUMNS = 6, 8  # at most so many sample sets and pictures of each


def write_report(folder: str | Path, repo_id: str | None = None) -> Path:
    """Write report.html: result, samples, curves, certificate, settings, data and licences, cost, and how to load it.

    One file that needs nothing from outside. repo_id: where the adapter is shared, for the lines that load it. A
    certificate of the adapter that is not there yet is made now, which loads the base model.
    Raises CheckpointError if the folder holds no run.
    """
    run = _certified(Run.read(folder, repo_id))
    body = "\n".join(
        (
            f"<h1>{markup.text(run.name)}</h1>\n<p class=lead>{markup.text(run.what())}</p>",
            f"<p class=result>{markup.text(run.result())}</p>",
            _samples_section(run),
            _curves_section(run),
            _certificate_section(run),
            markup.section("Settings", _settings(run)),
            markup.section("Data and licences", _data(run)),
            markup.section("Cost and versions", markup.table(run.cost() | versions())),
            markup.section("Load it", f"<pre><code>{markup.text(run.snippet())}</code></pre>"),
        )
    )
    page = markup.PAGE.format(title=markup.text(run.name), style=markup.STYLE, body=body)
    return write_atomically(run.folder / FILE, redacted(page))


def _certified(run: Run) -> Run:
    """With a certificate for the adapter of these very bytes, unless base or checkpoint are gone."""
    if run.certificate is None and (run.folder / FILE_NAME).is_file():
        try:
            inference.certify_run(run.folder)
        except (CheckpointError, ModelError):
            return run
    return Run.read(run.folder, run.repo_id)


def _certificate_section(run: Run) -> str:
    """What each reader made of each file."""
    if not run.certificates:
        text = "None: the run's base model or its checkpoint is not here any more, so nothing can be compared."
        return markup.section("Certificate", f"<p>{text}</p>")
    rows = {f"{c.file} ({c.format})": _readings(c) for c in run.certificates}
    note = (
        "Each file was read back into a fresh base model and compared with the trained one at fixed latents, noise and "
        "timestep. The limit is float32 rounding."
    )
    return markup.section("Certificate", f"{markup.table(rows)}<p>{note}</p>")


def _readings(certificate: inference.Certificate) -> str:
    said = [
        f"{reading.reader}: "
        + (
            reading.refused
            or f"outputs differ by {reading.difference:.1e}, {len(reading.missing)} layers not loaded"
        )
        for reading in certificate.readings
    ]
    verdict = "holds" if certificate.holds else "DOES NOT HOLD"
    return (
        f"{verdict} for {len(certificate.modules)} layers (limit {certificate.limit:.1e}, the adapter itself changes "
        f"outputs by {certificate.effect:.2g}); {'; '.join(said)}; sha256 {certificate.sha256[:16]}..."
    )


def _samples_section(run: Run) -> str:
    """A strip: rows are the base model and the steps, columns are prompts with their seeds."""
    if not run.samples:
        return ""
    prompts = run.config.validation_prompts[:COLUMNS]
    seeds = min(run.seeds, max(1, COLUMNS // len(prompts)))
    rows = {
        label: [
            file
            for p in range(len(prompts))
            for file in run.samples[label][p * run.seeds : p * run.seeds + seeds]
        ]
        for label in _spread(list(run.samples), ROWS)
    }
    note = "Each column keeps its prompt and seed; the first row is the base model without the adapter."
    return markup.section("Samples", f"{markup.strip(prompts, rows)}<p>{note}</p>")


def _spread(labels: list[str], most: int) -> list[str]:
    """At most so many labels, evenly spaced, with the first and the last."""
    if len(labels) <= most:
        return labels
    return [labels[round(i * (len(labels) - 1) / (most - 1))] for i in range(most)]


def _curves_section(run: Run) -> str:
    if not run.events("step"):
        return ""
    parts = [
        markup.figure(
            plots.training_figure(run.history),
            "Loss, held-out difference and learning rate over the steps",
        )
    ]
    probes = [probe for probe in run.events("probe") if probe["step"] > 0]
    if probes:
        parts.append(
            markup.figure(
                plots.probe_by_timestep(probes[-1]["by_timestep"]), "Held-out loss by timestep"
            )
        )
    return markup.section("Curves", "".join(parts))


def _settings(run: Run) -> str:
    everything = {name: shown(value) for name, value in flat(run.config.to_dict()).items()}
    return f"{markup.table(run.settings())}<details><summary>All settings</summary>{markup.table(everything)}</details>"


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
        f"<details><summary>Licence text of the {of}</summary><pre>{markup.text(text)}</pre></details>"
        for of, text in texts
        if text
    )
    return markup.table(rows) + details
