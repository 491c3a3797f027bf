"""README.md of a run: a model card with the Hub's header, complete without editing."""

from pathlib import Path

from diffusers.utils.hub_utils import populate_model_card
from huggingface_hub import ModelCard, ModelCardData

from lora_nb.files import write_atomically
from lora_nb.redaction import redacted
from lora_nb.report.facts import Run

FILE = "README.md"


def write_card(folder: str | Path) -> Path:
    """Write README.md: a model card with the Hub's header, complete without editing.

    Raises CheckpointError if the folder holds no run.
    """
    run = Run.read(folder)
    last = run.last_samples()
    header = ModelCardData(
        # A folder's path would read as somebody's model on the Hub.
        base_model=Path(run.base).name if run.base_is_local else run.base,
        library_name="diffusers",
        license=run.base_licence.name or "other",
        pipeline_tag="text-to-image",
        instance_prompt=run.trigger() or None,
        widget=[
            {"text": prompt, "output": {"url": file.relative_to(run.folder).as_posix()}}
            for prompt, file in zip(run.config.validation_prompts, last[:: run.seeds], strict=False)
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
{trigger}
```python
{run.snippet()}
```

The file carries its own alpha: load it by folder and `weight_name` as above, and the scale is as trained.

## Result

{run.result()} The draws of noise and timesteps are the same with and without the adapter, so the difference is the
adapter's. A lower loss says that the pictures became likelier, not that they became better: look at the samples.

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


def _card_strip(run: Run) -> str:
    files = run.last_samples()[:: run.seeds][:4]
    if not files:
        return ""
    prompts = run.config.validation_prompts[: len(files)]
    links = " | ".join(
        f"![{p}](samples/{file.name})" for p, file in zip(prompts, files, strict=True)
    )
    return f"| {' | '.join(prompts)} |\n|{'---|' * len(files)}\n| {links} |\n\n"


def _markdown_table(rows: dict[str, str]) -> str:
    lines = [f"| {name} | {value.replace('|', '/')} |" for name, value in rows.items()]
    return "\n".join(["| setting | value |", "|---|---|", *lines])
