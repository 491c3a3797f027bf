"""Both forms of file, for every family: what was trained is what our reader, and diffusers alone, make of the file."""

import dataclasses
import json
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from test_families import LOADERS
from test_formats_kohya import CASES, FAMILIES, assert_close, deltas, diffusers_reads, stir

from lora_nb import adapters, formats, inference, rng
from lora_nb.errors import FormatError
from lora_nb.families import REGISTRY, Batch, load_family, tiny

DRAWN = (
    settings.default.max_examples
)  # 25, and 200 in the long profile, for all families together at least
ALPHAS = st.sampled_from([0.5, 1, 2, 3, 7.5, 16])
RANKS = st.integers(1, 8)


def model_of(name: str, folder: Path) -> Path:
    return tiny.build(name, folder / name)


def kinds(module: torch.nn.Module) -> list[str]:
    """The ends of layers' names that peft takes as target modules: to_q, to_out.0, fc1.

    Not those that name something else too, nor convolutions in groups, whose rank must be a multiple of these.
    """
    layers = adapters.adaptable(module)
    fit = {name for name, layer in layers.items() if getattr(layer, "groups", 1) == 1}
    words = [name.split(".") for name in fit]
    ends = {".".join(w[-2:]) if w[-1].isdigit() else w[-1] for w in words}
    named = [name for name, _ in module.named_modules()]
    return sorted(e for e in ends if fit.issuperset(n for n in named if adapters.matches(n, e)))


@st.composite
def cases(draw, parts: dict[str, list[str]]):
    """peft settings for some of these parts, on some of their kinds of layers."""
    chosen = draw(st.lists(st.sampled_from(list(parts)), min_size=1, unique=True))
    configs = {}
    for part in chosen:
        kind = st.sampled_from(parts[part])
        targets = draw(st.lists(kind, min_size=1, max_size=6, unique=True))
        if part.startswith("text_encoder"):  # by this layer diffusers tells what a file is
            targets = ["out_proj", *(t for t in targets if t != "out_proj")]
        some = st.sampled_from(targets)
        configs[part] = {
            "r": draw(RANKS),
            "lora_alpha": draw(ALPHAS),
            "use_rslora": draw(st.booleans()),
            "target_modules": targets,
            "rank_pattern": draw(st.dictionaries(some, RANKS, max_size=2)),
            "alpha_pattern": draw(st.dictionaries(some, ALPHAS, max_size=2)),
        }
    return configs


def written(family, folder: Path) -> list[Path]:
    """The family's adapters in each form that can hold them; the Kohya form refuses what it has no name for."""
    kohya, names = folder / "kohya.safetensors", deltas(family)
    if family.name in FAMILIES and not any("text_projection" in name for name in names):
        formats.save_kohya(family, kohya)
    else:
        with pytest.raises(FormatError, match=r"no exact Kohya form|no name for"):
            formats.save_kohya(family, kohya)
        assert not kohya.exists()
    return [formats.save_diffusers(family, folder / "diffusers.safetensors"), *folder.glob("k*")]


@diffusers_reads
@pytest.mark.property
@pytest.mark.parametrize("name", REGISTRY)
def test_every_scale_survives_the_round_trip(name, tmp_path, tmp_path_factory):
    """Rank, alpha, rsLoRA, patterns, parts, layers: both forms, read by us and by diffusers."""
    model = model_of(name, tmp_path)
    trained, fresh = (load_family("auto", str(model)) for _ in range(2))
    pipeline = fresh.pipeline()
    theirs = LOADERS.get(name, lambda pipe: pipe.load_lora_weights)(pipeline)
    parts = {part: kinds(module) for part, module in trained.trainable.items()}

    @settings(max_examples=max(6, DRAWN // 4))
    @given(configs=cases(parts), seed=st.integers(0, 99))
    def check(configs, seed):
        stir(trained, configs, seed)
        expected = deltas(trained)
        for file in written(trained, tmp_path_factory.mktemp("files")):
            inference.use_adapter(pipeline, file)
            assert_close(deltas(fresh), expected)
            inference.remove_adapter(pipeline)
            theirs(str(file.parent), weight_name=file.name)
            assert_close(deltas(fresh), expected)
            inference.remove_adapter(pipeline)

    check()


ALONE = """
import json, sys, torch
from typing import get_type_hints
from diffusers import DiffusionPipeline, WuerstchenPriorPipeline
assert "lora_nb" not in sys.modules
def flat(value):
    if isinstance(value, torch.Tensor):
        return [value]
    values = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return [tensor for inner in values for tensor in flat(inner)]
found, pipes = {}, {}
for model, file, calls in json.loads(open(sys.argv[1]).read()):
    if model not in pipes:
        index = DiffusionPipeline.load_config(model)
        if index["_class_name"] == "WuerstchenPriorPipeline":  # one of its classes is not where its index says
            kinds = get_type_hints(WuerstchenPriorPipeline.__init__)
            whole = {n: kinds[n].from_pretrained(model, subfolder=n) for n in index if isinstance(index[n], list)}
            pipes[model] = WuerstchenPriorPipeline(**whole)
        else:
            pipes[model] = DiffusionPipeline.from_pretrained(model, use_safetensors=True)
    pipe = pipes[model]
    folder, _, weight_name = file.rpartition("/")
    whole = hasattr(pipe, "load_lora_weights")
    part = None if whole else pipe.unet if hasattr(pipe, "unet") else pipe.prior
    if whole:
        pipe.load_lora_weights(folder, weight_name=weight_name)
    else:
        part.load_lora_adapter(folder, weight_name=weight_name, prefix=None)
    pipe.to(torch.float64)
    off = 0.0
    for name, args, kwargs, expected in torch.load(calls, weights_only=True):
        with torch.no_grad():
            got = flat(getattr(pipe, name)(*args, **kwargs))
        assert len(got) == len(expected) > 0
        for a, b in zip(got, expected):
            off = max(off, (a - b).abs().max().item() / max(1.0, b.abs().max().item()))
    found[file] = off
    pipe.unload_lora_weights() if whole else part.unload_lora()
print(json.dumps(found))
"""


def flat(value) -> list[torch.Tensor]:
    """The tensors in a module's output, in their order."""
    if isinstance(value, torch.Tensor):
        return [value]
    values = value.values() if isinstance(value, dict) else value
    return [t for v in values for t in flat(v)] if isinstance(value, dict | list | tuple) else []


@contextmanager
def in_float64(family):
    """Rounding of float32 adds up to as much as the test allows, and differs from machine to machine."""
    modules = inference.attach.modules(family.pipeline())
    try:
        for module in modules:
            torch.nn.Module.to(module, torch.float64)
        family.dtype = torch.float64
        yield
    finally:
        for module in modules:
            torch.nn.Module.to(module, torch.float32)
        family.dtype = torch.float32


@torch.no_grad()
def calls_of(family) -> list[tuple]:
    """(part, arguments, keywords, tensors of the output) of one prediction from captions and pictures."""
    calls, hooks = [], []
    for part, module in family.trainable.items():

        def keep(_, args, kwargs, out, part=part):
            calls.append((part, args, kwargs, flat(out)))

        hooks.append(module.register_forward_hook(keep, with_kwargs=True))
    captions, side = ["", "a fox"], 64
    pixels = rng.normal((3, side, side), 1, "pixels", range(2)).clamp(-1, 1)
    moments, states = family.moments(pixels), family.picture_states(pixels)
    blank = Batch.of_captions(captions, side)
    batch = dataclasses.replace(blank, moments=moments, picture_states=states)
    x_t = rng.normal(moments[0].shape[1:], 1, "latents", range(2))
    t = family.objective.sample_t(torch.tensor([0.5, 0.2]))
    with in_float64(family):
        family.predict(x_t, t, family.condition(batch))
    for hook in hooks:
        hook.remove()
    return calls


@torch.no_grad()
def effect(family, calls: list[tuple]) -> float:
    """How far the base is from what the trained parts say."""
    with adapters.disabled(family), in_float64(family):
        pairs = [(flat(family.trainable[part](*a, **k)), out) for part, a, k, out in calls]
    return max(
        float((a - b).abs().max()) for base, out in pairs for a, b in zip(base, out, strict=True)
    )


def jobs_of(name: str, folder: Path) -> list[tuple[str, str, str]]:
    """(model, file, calls) of fixed and of drawn settings of a family, written into the folder."""
    model = model_of(name, folder)
    family = load_family("auto", str(model))
    parts = {part: kinds(module) for part, module in family.trainable.items()}
    jobs = []

    def write(configs, seed):
        place = folder / f"{name}-{len(jobs)}"
        stir(family, configs, seed)
        files, calls = written(family, place), calls_of(family)
        assert effect(family, calls) > 1e-4
        torch.save(calls, place / "calls")
        jobs.extend((str(model), str(file), str(place / "calls")) for file in files)

    for config in CASES.values():
        write(dict.fromkeys(family.trainable, config), 0)
    drawing = settings(max_examples=max(2, DRAWN // 10), phases=[Phase.generate])
    drawing(given(configs=cases(parts), seed=st.integers(0, 99))(write))()
    return jobs


@diffusers_reads
def test_diffusers_alone_sees_the_trained_model(tmp_path):
    """In a process without lora_nb: every trained part says through the files what it said when they were written."""
    jobs = [job for name in REGISTRY for job in jobs_of(name, tmp_path)]
    (tmp_path / "alone.py").write_text(ALONE)
    (tmp_path / "jobs.json").write_text(json.dumps(jobs))
    done = subprocess.run(
        [sys.executable, "alone.py", "jobs.json"],
        cwd=tmp_path, capture_output=True, text=True, timeout=500, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert len(found) == len(jobs)
    assert {file: off for file, off in found.items() if off > 1e-6} == {}
