"""README.md of a run: a model card with the Hub's header, complete without editing."""

from pathlib import Path

from diffusers.utils.hub_utils import populate_model_card
from huggingface_hub import ModelCard, ModelCardData

from lora_nb.files import write_atomically
from lora_nb.inference import Certificate
from lora_nb.redaction import redacted
from lora_nb.report.facts import GALLERY, Run

FILE = "README.md"


def write_card(folder: str | Path, repo_id: str | None = None) -> Path:
    """Write README.md: a model card with the Hub's header, complete without editing.

    repo_id: where the adapter is shared, for the lines that load it; without it they name the run's folder.
    Raises CheckpointError if the folder holds no run.
    """
    run = Run.read(folder, repo_id)
    last = list(run.gallery().values())[-1:]
    header = ModelCardData(
        # A folder's path would read as somebody's model on the Hub.
        base_model=Path(run.base).name if run.base_is_local else run.base,
        library_name="diffusers",
        license=run.base_licence.name or "other",
        pipeline_tag="text-to-image",
        instance_prompt=run.trigger() or None,
        widget=[
            {"text": prompt, "output": {"url": file.relative_to(run.folder).as_posix()}}
            for files in last
            for prompt, file in zip(run.config.validation_prompts, files, strict=False)
        ]
        or None,
    )
    card = ModelCard(f"---\n{header.to_yaml()}\n---\n\n{_card_body(run)}")
    populate_model_card(card, ["text-to-image", "diffusers", "diffusers-training", "lora"])
    return write_atomically(run.folder / FILE, redacted(str(card)))


def _card_body(run: Run) -> str:
    trigger = (
        f"\nPut `{run.trigger()}` at the end of a prompt, as the captions had it.\n"
        if run.trigger()
        else ""
    )
    return f"""# {run.name}

{run.what()}

{_card_strip(run)}## Use
{trigger}{_own_base(run)}
```python
{run.snippet()}
```

The file carries its own alpha: load it by folder and `weight_name` as above, and the scale is as trained.

## Result

{run.result()} The draws of noise and timesteps are the same with and without the adapter, so the difference is the
adapter's. A lower loss says that the pictures became likelier, not that they became better: look at the samples.

{_proof(run)}

## Training

{_markdown_table(run.settings() | run.cost())}

## Data and licences

- Pictures: {run.data}; licence: {run.data_licence.stated}.
- Fingerprint of pictures and captions (sha256): `{run.start.get("fingerprint", "unknown")}`.
- Base model: {run.base}; licence: {run.base_licence.stated}. The adapter follows it.

## Limits

The adapter knows what its pictures showed and draws little else better than the base model; on prompts far from the
captions it may do worse. What the base model cannot draw, or draws with a bias, stays so. It fits this base model and
others of the same shape only.
"""


def _proof(run: Run) -> str:
    """One sentence on the round trip of each file."""
    said = [
        f"`{c.file}`, read back into a fresh base model, gives the trained model's outputs {_within(c)}."
        for c in run.certificates
        if c.holds
    ]
    return " ".join(said) or "No file of it was read back and compared."


def _within(certificate: Certificate) -> str:
    off = max(reading.difference for reading in certificate.readings)
    return f"to within {off:.1e}" if off else "exactly"


def _own_base(run: Run) -> str:
    if not run.base_is_local:
        return ""
    return f"\n`{run.base}` is the folder of the base model: put where yours is in its place.\n"


def _card_strip(run: Run) -> str:
    """The gallery: a column for each prompt, the base model above, the adapter below."""
    gallery = run.gallery()
    if not gallery:
        return ""
    prompts = [p.replace("|", "/") for p in run.config.validation_prompts[:GALLERY]]
    lines = [f"| | {' | '.join(prompts)} |", f"|---|{'---|' * len(prompts)}"]
    for label, files in gallery.items():
        links = (f"![{p}](samples/{file.name})" for p, file in zip(prompts, files, strict=True))
        lines.append(f"| {'base model' if label == 'base' else label} | {' | '.join(links)} |")
    return "\n".join(lines) + "\n\n"


def _markdown_table(rows: dict[str, str]) -> str:
    lines = [f"| {name} | {value.replace('|', '/')} |" for name, value in rows.items()]
    return "\n".join(["| setting | value |", "|---|---|", *lines])
