"""The report and the card of a real run: complete, self-contained, and silent about paths and people."""

import hashlib
import html
import html.parser
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lora_nb.config import DataSpec, LoraSpec, TrainConfig
from lora_nb.errors import CheckpointError
from lora_nb.families import tiny
from lora_nb.formats import FILE_NAME
from lora_nb.inference import with_samples
from lora_nb.report import facts, markup, page, write_card, write_report
from lora_nb.trainer import train

TOKEN = "hf_" + "Q7canary" * 4


def write_pictures(folder: Path, split: str, n: int) -> None:
    (folder / split).mkdir(parents=True)
    draw, rows = np.random.default_rng(n), []
    for i in range(n):
        pixels = draw.integers(0, 255, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / split / f"{i}.png")
        rows.append(json.dumps({"file_name": f"{i}.png", "text": f"thing {i}, noisy style"}))
    (folder / split / "metadata.jsonl").write_text("\n".join(rows) + "\n")


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A user's home with a base model, pictures and a run of four steps."""
    home = tmp_path_factory.mktemp("home") / "jane-canary"
    base = tiny.build("sd", home / "models" / "base")
    (base / "README.md").write_text("---\nlicense: apache-2.0\n---\n# Base\n")
    pictures = home / "pictures"
    write_pictures(pictures, "train", 5)
    write_pictures(pictures, "validation", 6)
    (pictures / "LICENSE").write_text("Free for <everyone>, see text.\n")
    (pictures / "README.md").write_text("---\nlicense: cc-by-4.0\n---\n")
    config = TrainConfig(
        pretrained_model_name_or_path=str(base),
        lora={"unet": LoraSpec(rank=2, lora_alpha=4), "text_encoder": LoraSpec(rank=3)},
        data=DataSpec(train_data_dir=str(pictures), resolution=16),
        output_dir=str(home / "runs" / "noisy"),
        seed=5,
        train_batch_size=2,
        max_train_steps=4,
        validation_prompts=("a fox, noisy style", f'a "<b>car</b>" {TOKEN}'),
        num_validation_images=2,
        validation_steps=2,
        num_inference_steps=2,
        guidance_scale=3.0,
    )
    for _ in with_samples(train(config)):
        pass
    return home


@pytest.fixture(scope="module")
def run(home) -> Path:
    return home / "runs" / "noisy"


@pytest.fixture(scope="module")
def report(run) -> str:
    return write_report(run).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def card(run) -> str:
    return write_card(run).read_text(encoding="utf-8")


def text_of(report: str) -> str:
    """What a reader sees."""
    body = re.sub(r"<style>.*?</style>", "", report, flags=re.DOTALL)
    return " ".join(html.unescape(re.sub(r"<[^>]+>", " ", body)).split())


def last_probe(run: Path) -> dict:
    lines = [json.loads(line) for line in (run / "history.jsonl").read_text().splitlines()]
    return [line for line in lines if line["event"] == "probe"][-1]


def measured(run: Path) -> list[str]:
    """What page and card say of the last probe: its error and the interval of the difference."""
    probe = last_probe(run)
    change, error = probe["difference"], probe["standard_error"]
    low, high = change - 1.96 * error, change + 1.96 * error
    return [
        f"{abs(change):.4f} {'lower' if change < 0 else 'higher'}",
        f"standard error {error:.4f}",
        f"95 % interval of the difference {low:+.4f} to {high:+.4f}",
    ]


class Balanced(html.parser.HTMLParser):
    """Fails on a tag that closes what is not open."""

    void = ("meta", "img")

    def __init__(self):
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []

    def handle_starttag(self, tag, attributes):
        self.links += [value for name, value in attributes if name in ("src", "href")]
        if tag not in self.void:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_page_is_well_formed_and_needs_nothing_from_outside(report):
    parser = Balanced()
    parser.feed(report)
    assert parser.open == []
    assert len(parser.links) == 3 * 4 + 2  # three sample sets of four pictures, two figures
    assert all(re.match(r"data:image/(png|webp);base64,", link) for link in parser.links)
    assert "<script" not in report
    assert "url(" not in report
    assert "@import" not in report


def test_page_says_what_was_trained_and_what_came_out(report, run):
    text = text_of(report)
    assert "rank 2 on the unet and rank 3 on the text_encoder" in text
    assert "trained on 5 pictures of pictures for 4 steps" in text
    assert "On 6 held-out pictures" in text
    assert all(words in text for words in measured(run))
    assert "rank 2, alpha 4, dropout 0, learning rate 0.0001" in text
    assert "base a fox" not in text  # labels and prompts are heads of rows and columns
    assert [label for label in ("base", "step 2", "step 4") if f">{label}</th>" not in report] == []


def test_page_and_card_carry_the_certificate_of_the_file(report, card, run):
    """Made when the report is written, against the checkpoint, and kept beside the file."""
    kept = json.loads((run / "pytorch_lora_weights.certificate.json").read_text())
    assert kept["holds"]
    assert kept["sha256"] == hashlib.sha256((run / FILE_NAME).read_bytes()).hexdigest()
    assert [r["reader"] for r in kept["readings"]] == ["lora_nb", "diffusers"]
    assert f"holds for {len(kept['modules'])} layers" in text_of(report)
    assert kept["sha256"][:16] in text_of(report)
    assert "read back into a fresh base model, gives the trained model's outputs exactly" in card


def test_a_file_that_is_not_the_trained_one_is_called_so(run, tmp_path):
    copy = shutil.copytree(run, tmp_path / "noisy")
    tensors = {name: 2 * value for name, value in load_file(copy / FILE_NAME).items()}
    with safe_open(copy / FILE_NAME, "pt") as opened:
        save_file(tensors, copy / FILE_NAME, opened.metadata())
    assert "DOES NOT HOLD" in text_of(write_report(copy).read_text(encoding="utf-8"))
    assert "No file of it was read back" in write_card(copy).read_text(encoding="utf-8")


def test_without_checkpoint_the_page_says_that_there_is_no_certificate(run, tmp_path):
    copy = shutil.copytree(run, tmp_path / "noisy")
    (copy / "pytorch_lora_weights.certificate.json").unlink(missing_ok=True)
    for folder in copy.glob("checkpoint-*"):
        shutil.rmtree(folder)
    text = text_of(write_report(copy).read_text(encoding="utf-8"))
    assert "its checkpoint is not here any more" in text


def test_cost_is_measured_or_said_not_to_be(report, run):
    text = text_of(report)
    lines = [json.loads(line) for line in (run / "history.jsonl").read_text().splitlines()]
    spent = sum(line["cpu_seconds"] for line in lines if line["event"] in ("end", "stop"))
    assert spent > 0
    assert f"CPU time {spent:.0f} s, samples included" in text
    assert "energy not measured" in text


def test_page_names_data_licence_and_versions(report, run):
    text = text_of(report)
    start = json.loads((run / "history.jsonl").read_text().splitlines()[0])
    assert start["fingerprint"] in text
    assert "cc-by-4.0" in text
    assert "apache-2.0" in text
    assert "Free for <everyone>, see text." in text
    assert "words that end every caption noisy style" in text
    assert f"torch {facts.versions()['torch']}" in text


def test_prompts_cannot_break_the_page(report):
    assert "<b>car</b>" not in report
    assert 'a "<b>car</b>"' in text_of(report)


@pytest.mark.parametrize("name", ["report.html", "README.md"])
def test_no_path_no_user_no_token(home, run, report, card, name):
    written = (run / name).read_text(encoding="utf-8")
    for secret in ("jane-canary", str(home), str(home.parent), TOKEN, str(Path.home()) + "/"):
        assert secret not in written


def test_page_is_readable_in_light_and_dark(report):
    """Contrast of text on page and card is at least 4.5 (WCAG 2.2 AA) in both schemes."""

    def luminance(colour: str) -> float:
        digits = colour.lstrip("#")
        digits = "".join(c * 2 for c in digits) if len(digits) == 3 else digits
        channels = [int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return float(np.dot(linear, (0.2126, 0.7152, 0.0722)))

    schemes = [
        dict(re.findall(r"--(\w+): (#\w+)", block))
        for block in re.findall(r":root \{(.*?)\}", markup.STYLE, re.S)
    ]
    assert len(schemes) == 2
    for scheme in schemes:
        for text in ("ink", "soft"):
            for ground in ("page", "card"):
                light, dark = sorted(
                    (luminance(scheme[text]), luminance(scheme[ground])), reverse=True
                )
                assert (light + 0.05) / (dark + 0.05) >= 4.5


def test_card_header_is_what_the_hub_reads(card, run):
    header = yaml.safe_load(card.split("---")[1])
    assert header["base_model"] == "base"
    assert header["library_name"] == "diffusers"
    assert header["license"] == "apache-2.0"
    assert header["instance_prompt"] == "noisy style"
    assert {"lora", "text-to-image", "diffusers"} <= set(header["tags"])
    assert header["widget"][0]["text"] == "a fox, noisy style"
    assert [entry["output"]["url"] for entry in header["widget"]] == [
        "samples/step-000004-p0-s0.png",
        "samples/step-000004-p1-s0.png",
    ]
    assert all((run / entry["output"]["url"]).is_file() for entry in header["widget"])


def test_card_is_complete(card, run):
    for part in (
        "# noisy",
        "## Use",
        "## Result",
        "## Training",
        "## Data and licences",
        "## Limits",
    ):
        assert f"\n{part}\n" in card
    assert "TODO" not in card
    assert "None" not in card
    result = card.split("\n## Result\n")[1].split("\n## ")[0]
    assert all(words in result for words in measured(run))
    for name in re.findall(r"\]\((samples/[^)]+)\)", card):
        assert (run / name).is_file()


def test_the_snippet_runs(card, home):
    """Copied from the card, offline, from the folder that holds model and run."""
    code = re.search(r"```python\n(.*?)```", card, re.DOTALL)[1]
    assert len(code.splitlines()) <= 10
    (home / "snippet.py").write_text(
        code.replace('"base"', '"models/base"').replace('"noisy"', '"runs/noisy"')
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "snippet.py"],
        cwd=home,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert Image.open(home / "picture.png").size == (16, 16)


def test_run_without_probe_samples_or_licence(home, tmp_path):
    """What is not known is said; nothing is made up."""
    pictures = tmp_path / "bare"
    write_pictures(pictures, "train", 3)
    config = TrainConfig(
        pretrained_model_name_or_path=str(home / "models" / "base"),
        data=DataSpec(train_data_dir=str(pictures / "train"), resolution=16),
        output_dir=str(tmp_path / "run"),
        seed=0,
        train_batch_size=1,
        max_train_steps=3,
    )
    steps = iter(train(config))
    next(steps)
    steps.close()
    text = text_of(write_report(tmp_path / "run").read_text(encoding="utf-8"))
    assert "for 1 of 3 steps" in text
    assert "Not measured: there were no held-out pictures" in text
    assert "licence of the pictures not stated beside it" in text
    assert "Samples" not in text
    assert "widget" not in write_card(tmp_path / "run").read_text(encoding="utf-8")


def test_no_run_is_one_sentence(tmp_path):
    for write in (write_report, write_card):
        with pytest.raises(CheckpointError, match="There is no run in"):
            write(tmp_path)


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("/home/jane/models/base", "base"),
        ("~/models/base", "base"),
        ("../jane/base", "base"),
        ("stabilityai/sdxl-turbo", "stabilityai/sdxl-turbo"),
        (None, "none"),
    ],
)
def test_public_names(value, shown):
    assert facts.public(value) == shown


def test_public_path_below_here_is_relative(tmp_path, monkeypatch):
    (tmp_path / "data" / "base").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert facts.public(tmp_path / "data" / "base") == "data/base"


def test_at_most_so_many_rows_with_first_and_last():
    labels = ["base", *(f"step {i}" for i in range(1, 30))]
    chosen = page._spread(labels, 6)
    assert (len(chosen), chosen[0], chosen[-1]) == (6, "base", "step 29")
    assert page._spread(labels[:4], 6) == labels[:4]


def test_adapter_file_stands_in_the_cost(report, run):
    assert f"adapter file {(run / FILE_NAME).stat().st_size / 1e6:.2f} MB" in text_of(report)
