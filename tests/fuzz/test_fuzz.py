"""Damaged files of every kind that we read: an answer or an error of ours, never anything else, and soon.

make test-long gives each target a minute. What made one fail once is kept in crashers/<target>/ and is a test for ever.
"""

import contextlib
import hashlib
import io
import json
import random
import resource
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from mutate import mutated
from picture_folders import doctor, good
from PIL import Image
from safetensors import torch as safetensors

from lora_nb import adapters, checkpoint
from lora_nb.config import LoraSpec
from lora_nb.data.decode import BadPicture, decode, header
from lora_nb.errors import LoraNbError
from lora_nb.families import load_family
from lora_nb.formats import inspect, save_adapter
from lora_nb.formats.header import adapter_file
from lora_nb.formats.reading import plan
from lora_nb.redaction import in_notebook
from lora_nb.run_folder import read_config, read_history

CRASHERS = Path(__file__).parent / "crashers"
TO_Q = "mid_block.attentions.0.transformer_blocks.0.attn2.to_q"
SECONDS = [1.5, pytest.param(60, marks=pytest.mark.long)]
EVERY_NAME = "pytorch_lora_weights.safetensors checkpoint-3 n.ipynb"
Target = tuple[list[bytes], Callable[[bytes], object]]  # seeds and what reads a mutant


@pytest.fixture(scope="module")
def pipeline_and_file(tiny_sd, tmp_path_factory):
    family = load_family("auto", str(tiny_sd))
    adapters.add(family, {"unet": LoraSpec(rank=2, lora_alpha=8, target_modules=("to_q",))})
    file = save_adapter(family, tmp_path_factory.mktemp("adapter"))
    adapters.remove(family)
    weight = family.unet.get_parameter(f"{TO_Q}.weight")
    rows, columns = weight.shape
    factors = {
        "lokr_w1": torch.ones(2, 2),
        "lokr_w2_a": torch.ones(rows // 2, 3),
        "lokr_w2_b": torch.ones(3, columns // 2),
        "alpha": torch.tensor(1.0),
    }
    lokr = safetensors.save(
        {f"lora_unet_{TO_Q.replace('.', '_')}.{name}": v for name, v in factors.items()}
    )
    return family.pipeline(), [file.read_bytes(), lokr]


def refusal(look: Callable, *arguments: object) -> str:
    """Our sentence if the mutant is refused; if it is read, every name, so that any is found in it."""
    try:
        look(*arguments)
    except LoraNbError as error:
        return str(error)
    return EVERY_NAME


@pytest.fixture
def lora_file(pipeline_and_file, tmp_path) -> Target:
    """A LoRA and a LoKr file, described and planned onto a pipeline."""
    pipeline, seeds = pipeline_and_file
    file = tmp_path / "pytorch_lora_weights.safetensors"

    def read(mutant: bytes) -> None:
        file.write_bytes(mutant)
        for look in (inspect, lambda path: plan(pipeline, adapter_file(path))):
            assert file.name in refusal(look, file)

    return seeds, read


@pytest.fixture
def manifest(tmp_path) -> Target:
    """A checkpoint's manifest and what stands beside it; no mutant counts as complete."""
    tensors = {"adapter/unet/a": torch.arange(12.0)}
    folder = checkpoint.save_checkpoint(
        tmp_path, 3, tensors, {"run": "r1", "best": None, "config": {"seed": 1}}
    )
    whole = {file.name: file.read_bytes() for file in folder.iterdir()}

    def same_as_written(folder: Path) -> None:
        back = checkpoint.read(folder)
        assert torch.equal(back.tensors["adapter/unet/a"], tensors["adapter/unet/a"])
        assert back.step == 3

    def read(mutant: bytes) -> None:
        name, _, content = mutant.partition(b"\n")
        name = name.decode("latin-1") if name.decode("latin-1") in whole else "MANIFEST.json"
        (folder / name).write_bytes(content)
        assert "checkpoint-3" in refusal(same_as_written, folder)
        (folder / name).write_bytes(whole[name])
        for file, look in (("config.json", read_config), ("history.jsonl", read_history)):
            (tmp_path / file).write_bytes(content)
            refusal(look, tmp_path)

    return [name.encode() + b"\n" + data for name, data in whole.items()], read


@pytest.fixture
def metadata_file(tmp_path) -> Target:
    """metadata.jsonl, metadata.csv and captions of a folder; the doctor reports and raises nothing."""
    folder = good(tmp_path / "set")
    text = (folder / "metadata.jsonl").read_bytes()
    table = b'file_name,text\na0.png,"red, or blue"\na1.png,x\na2.png,caf\xc3\xa9\n'

    def read(mutant: bytes) -> None:
        kind, content = mutant[:1], mutant[1:]
        (folder / "metadata.jsonl").unlink(missing_ok=True)
        (folder / "metadata.csv").unlink(missing_ok=True)
        name = {b"c": "metadata.csv", b"t": "a0.txt"}.get(kind, "metadata.jsonl")
        (folder / name).write_bytes(content)
        report = doctor(folder)
        report.table()
        report._repr_html_()
        assert report.rows or report.errors

    return [b"j" + text, b"c" + table, b"ta red cat, caf\xc3\xa9\n"], read


@pytest.fixture
def picture_bytes() -> Target:
    """Picture files of all formats; header and decoder."""
    values = np.random.default_rng(0).integers(0, 256, (20, 24, 3), dtype=np.uint8)
    seeds = []
    for mode, kind, save in (
        ("RGB", "PNG", {}), ("RGBA", "PNG", {}), ("P", "PNG", {"transparency": 3}),
        ("RGB", "JPEG", {}), ("CMYK", "JPEG", {}),
        ("RGB", "GIF", {}), ("RGB", "WEBP", {}), ("RGB", "TIFF", {"compression": "tiff_lzw"}), ("F", "TIFF", {}),
        ("L", "BMP", {}),
    ):  # fmt: skip
        stream = io.BytesIO()
        Image.fromarray(values).convert(mode).save(stream, kind, **save)
        seeds.append(stream.getvalue())

    def read(mutant: bytes) -> None:
        for look in (lambda: decode(mutant), lambda: header(io.BytesIO(mutant))):
            with contextlib.suppress(BadPicture):
                look()

    return seeds, read


@pytest.fixture
def notebook_json() -> Target:
    """A notebook's JSON for the scanner of secrets."""
    cell = {"source": ["login('hf_", "abcdefgh12345678')\n"], "outputs": [{"text": "/home/jane"}]}
    metadata = {"widgets": {"key": "0a1b2c3d" * 4}}
    whole = json.dumps({"cells": [cell], "metadata": metadata}).encode()

    def read(mutant: bytes) -> None:
        assert "n.ipynb" in refusal(in_notebook, mutant, "n.ipynb")

    return [whole], read


TARGETS = ("lora_file", "manifest", "metadata_file", "picture_bytes", "notebook_json")


def run(target: str, read: Callable[[bytes], object], mutant: bytes) -> None:
    """Read one mutant; what fails is written to crashers/ before it fails the test."""
    started = time.process_time()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's, on damaged tags
            read(mutant)
        assert time.process_time() - started < 2.0
    except BaseException:
        place = CRASHERS / target / hashlib.sha256(mutant).hexdigest()[:16]
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(mutant)
        raise


@pytest.mark.property
@pytest.mark.timeout(300)
@pytest.mark.parametrize("seconds", SECONDS)
@pytest.mark.parametrize("target", TARGETS)
def test_mutants(target, seconds, request):
    seeds, read = request.getfixturevalue(target)
    draw = random.Random(f"{target} {seconds}")
    for seed in seeds:
        run(target, read, seed)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    count, end = 0, time.monotonic() + seconds
    while time.monotonic() < end:
        run(target, read, mutated(draw.choice(seeds), draw))
        count += 1
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1e3
    print(f"{target}: {count} mutants in {seconds} s, {grown:.0f} MB more at most")
    assert count > 0
    assert grown < 512


@pytest.mark.parametrize(
    "file", sorted(CRASHERS.glob("*/*")), ids=lambda file: f"{file.parent.name}-{file.name}"
)
def test_what_failed_once_is_read_now(file, request):
    _, read = request.getfixturevalue(file.parent.name)
    run(file.parent.name, read, file.read_bytes())
