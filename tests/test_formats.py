"""LoRA files: ours is what diffusers writes plus metadata, and a description never needs a model."""

import html
import json
import re

import pytest
import torch
from diffusers import StableDiffusionPipeline
from diffusers.utils import convert_state_dict_to_diffusers
from peft import get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lora_nb import adapters, formats
from lora_nb.config import LoraSpec
from lora_nb.errors import FormatError, NumericsError
from lora_nb.families import REGISTRY, load_family, tiny


@pytest.fixture
def family(tiny_sd):
    family = load_family("auto", str(tiny_sd))
    adapters.add(
        family,
        {
            "unet": LoraSpec(rank=2, lora_alpha=1.0),
            "text_encoder": LoraSpec(rank=3, lora_alpha=6.0),
        },
    )
    for weights in adapters.parameters(family).values():
        for weight in weights:
            weight.data += 0.1
    return family


def test_our_file_is_the_one_diffusers_writes(family, tmp_path):
    ours = formats.save_adapter(family, tmp_path / "ours", {"trigger": "ink"})
    parts = {
        f"{part}_lora_layers": convert_state_dict_to_diffusers(get_peft_model_state_dict(module))
        for part, module in family.trainable.items()
    }
    metadata = {
        f"{part}_lora_adapter_metadata": module.peft_config["default"].to_dict()
        for part, module in family.trainable.items()
    }
    StableDiffusionPipeline.save_lora_weights(tmp_path / "theirs", **parts, **metadata)
    theirs = tmp_path / "theirs" / formats.FILE_NAME
    a, b = load_file(ours), load_file(theirs)
    assert a.keys() == b.keys()
    assert all(torch.equal(a[k], b[k]) for k in a)
    headers = []
    for file in (ours, theirs):
        with safe_open(file, framework="pt") as opened:
            headers.append(opened.metadata())
    described = [json.loads(h["lora_adapter_metadata"]) for h in headers]
    for settings in described:
        for name, value in settings.items():
            if isinstance(value, list):
                settings[name] = sorted(value)
    assert described[0] == described[1]
    assert headers[0]["trigger"] == "ink"


def test_inspect_says_what_is_in_it(family, tmp_path):
    report = formats.inspect(formats.save_adapter(family, tmp_path))
    assert report.format == "diffusers"
    assert report.parts["unet"].ranks == (2,)
    assert report.parts["unet"].alphas == (1.0,)
    assert report.parts["text_encoder"].alphas == (6.0,)
    for part, weights in adapters.parameters(family).items():
        assert report.parts[part].parameters == sum(w.numel() for w in weights)
        assert report.parts[part].modules * 2 == len(weights)
    assert report.problems == ()
    assert "text_encoder" in report.table()
    assert formats.inspect(tmp_path) == formats.inspect(tmp_path)  # a folder will do


def test_the_notebook_view_says_the_same_and_trusts_no_word_of_the_file(family, tmp_path):
    file = formats.save_adapter(family, tmp_path, {"trigger": "<script>alert(1)</script>"})
    report = formats.inspect(file)
    assert repr(report) == report.table()
    page = report._repr_html_()
    assert "<script" not in page
    assert "&lt;script&gt;alert(1)" in page
    cells = re.findall(r"<td>([^<]*)</td>", page)
    for part, found in report.parts.items():
        at = cells.index(part)
        assert cells[at + 1 : at + 4] == [
            str(found.modules),
            str(found.ranks[0]),
            f"{found.alphas[0]:g}",
        ]
    for m in report.modules:
        at = cells.index(f"{m.part} {m.layer}")
        assert cells[at + 1 : at + 4] == [f"{m.rank}", f"{m.alpha:.4g}", f"{m.scale:.4g}"]
    assert set(report.metadata) <= set(cells)
    for sentence in (*report.problems, *report.lost["kohya"]):
        assert html.escape(sentence) in page


@pytest.mark.parametrize("name", sorted(REGISTRY))
def test_our_own_file_of_any_family_names_it(tmp_path, name):
    """Also of models whose sizes nobody knows, as the tiny ones are."""
    family = load_family("auto", str(tiny.build(name, tmp_path / "base")))
    adapters.add(family, {next(iter(family.trainable)): LoraSpec(rank=2)})
    assert formats.inspect(formats.save_adapter(family, tmp_path)).family == name
    if getattr(family, "kohya", None):
        file = formats.save_kohya(family, tmp_path / "kohya.safetensors")
        assert formats.inspect(file).family == name


def test_a_family_that_is_none_of_ours_is_not_repeated(family, tmp_path):
    file = formats.save_adapter(family, tmp_path, {"family": "<b>best</b>"})
    assert formats.inspect(file).family == "unknown"


@pytest.mark.parametrize("fault", [MemoryError(), PermissionError(13, "no"), KeyboardInterrupt()])
def test_a_fault_of_the_machine_is_not_blamed_on_the_file(family, tmp_path, monkeypatch, fault):
    file = formats.save_adapter(family, tmp_path)

    def failing(_):
        raise fault

    monkeypatch.setattr(formats.inspecting, "load_file", failing)
    with pytest.raises(type(fault)):
        formats.inspect(file)


def test_inspect_warns_of_lost_alpha(family, tmp_path):
    file = formats.save_adapter(family, tmp_path)
    save_file(load_file(file), tmp_path / "bare.safetensors", metadata={"format": "pt"})
    report = formats.inspect(tmp_path / "bare.safetensors")
    assert "alpha = rank" in report.problems[0]
    assert report.parts["unet"].alphas == (2.0,)  # what a reader would take


def test_inspect_reads_kohya_and_peft_keys(tmp_path):
    a, b = torch.zeros(4, 8), torch.zeros(8, 4)
    kohya = {
        "lora_unet_x.lora_down.weight": a,
        "lora_unet_x.lora_up.weight": b,
        "lora_unet_x.alpha": torch.tensor(2.0),
    }
    kohya |= {"lora_te_y.lora_down.weight": a.clone(), "lora_te_y.lora_up.weight": b.clone()}
    save_file(kohya, tmp_path / "kohya.safetensors")
    report = formats.inspect(tmp_path / "kohya.safetensors")
    assert (report.format, set(report.parts)) == ("kohya", {"unet", "text_encoder"})
    assert report.parts["unet"].alphas == (2.0,)
    save_file(
        {"unet.a.b.lora_A.weight": a, "unet.a.b.lora_B.weight": b}, tmp_path / "peft.safetensors"
    )
    assert formats.inspect(tmp_path / "peft.safetensors").format == "peft"


def test_non_finite_weights_are_never_written(family, tmp_path):
    next(iter(adapters.parameters(family)["unet"])).data[0, 0] = float("inf")
    with pytest.raises(NumericsError, match="not finite"):
        formats.save_adapter(family, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_inspect_names_non_finite_weights(tmp_path):
    save_file(
        {"unet.a.lora_A.weight": torch.full((2, 2), float("nan"))}, tmp_path / "x.safetensors"
    )
    assert "not finite" in " ".join(formats.inspect(tmp_path / "x.safetensors").problems)


@pytest.mark.parametrize("start", formats.header.PICKLES)
def test_a_header_as_long_as_a_pickles_first_bytes_is_none(family, tmp_path, start):
    """Bytes 80 02 are also a length, of 640: found by a property test, on one of its files."""
    file = formats.save_adapter(family, tmp_path)
    wanted, tensors = int.from_bytes(start, "little") + (1 << 16), load_file(file)
    save_file(tensors, file, {"x": "x"})
    length = int.from_bytes(file.read_bytes()[:8], "little")
    save_file(tensors, file, {"x": "x" * (1 + wanted - length)})
    assert file.read_bytes()[:2] == start
    assert formats.inspect(file).tensors == len(tensors)


def test_other_files_are_refused(tmp_path):
    cases = {
        "pickle.safetensors": b"\x80\x04\x95evil",
        "zip.bin": b"PK\x03\x04 torch zip",
        "text.safetensors": b"hello",
        "empty.safetensors": b"",
    }
    for name, content in cases.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(FormatError, match=name):
            formats.inspect(tmp_path / name)
    with pytest.raises(FormatError, match="no LoRA file"):
        formats.inspect(tmp_path / "nowhere.safetensors")
    save_file({"conv.weight": torch.zeros(2)}, tmp_path / "model.safetensors")
    with pytest.raises(FormatError, match="no LoRA weights"):
        formats.inspect(tmp_path / "model.safetensors")
