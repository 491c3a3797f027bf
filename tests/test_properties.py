"""Laws that hold for any input, by examples that Hypothesis draws: 25 in make test, 200 in make test-long.

More of them stand beside what they are about: pixels and order in test_data_pixels, the config in test_config.
"""

import dataclasses
import io
import itertools
import json
import math
import string
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from picture_folders import doctor, metadata, picture
from PIL import Image
from test_data import words_tokenizer

from lora_nb import adapters, checkpoint, data, inference
from lora_nb.config import DataSpec, LoraSpec, TrainConfig
from lora_nb.data.decode import decode
from lora_nb.data.metadata import captions_of
from lora_nb.data.report import Problems
from lora_nb.errors import ConfigError
from lora_nb.families import Batch, load_family
from lora_nb.formats import save_adapter
from lora_nb.inference import attach
from lora_nb.loss import diffusion_loss
from lora_nb.optimization import learning_rate_factors
from lora_nb.redaction import redacted

pytestmark = pytest.mark.property

TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "proj_in", "conv1", "ff.net.2")
targets = st.lists(st.sampled_from(TARGETS), min_size=1, unique=True).map(tuple)
specs = st.builds(
    LoraSpec,
    rank=st.integers(1, 32),
    lora_alpha=st.one_of(st.integers(1, 64).map(float), st.floats(0.01, 64)),
    target_modules=targets,
)


@pytest.fixture(scope="module")
def family(tiny_sd):
    return load_family("auto", str(tiny_sd))


@pytest.fixture(scope="module")
def pipeline(tiny_sd):
    return inference.load_pipeline(tiny_sd)


def stir(family, seed: int) -> None:
    """Give B some weight, as training would."""
    draw = torch.Generator().manual_seed(seed)
    for weight in adapters.parameters(family)["unet"]:
        weight.data = 0.1 * torch.randn(weight.shape, generator=draw)


def deltas(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """What the adapter adds to each weight, alpha and all."""
    return {name: layer.get_delta_weight("default") for name, layer in adapters.layers(module)}


@given(spec=specs, seed=st.integers(0, 1000))
def test_a_saved_adapter_loads_to_the_same_change_whatever_rank_alpha_and_targets(
    family, pipeline, spec, seed
):
    adapters.add(family, {"unet": spec}, seed=seed)
    try:
        stir(family, seed)
        with tempfile.TemporaryDirectory() as folder:
            taken = inference.use_adapter(pipeline, save_adapter(family, folder))
        ours, theirs = deltas(family.unet), deltas(pipeline.unet)
        assert ours.keys() == theirs.keys()
        assert taken == {"unet": 2 * len(ours)}
        for name, delta in ours.items():
            assert torch.allclose(delta, theirs[name], atol=1e-6, rtol=1e-6)
    finally:
        adapters.remove(family)
        inference.remove_adapter(pipeline)


@given(spec=specs, seed=st.integers(0, 1000), t=st.integers(0, 999))
def test_a_fresh_adapter_changes_no_output(family, spec, seed, t):
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(2, 4, 8, 8, generator=draw)
    states = family.text_states(["a", "b"])

    def output() -> torch.Tensor:
        with torch.no_grad():
            return family.predict(x, torch.tensor([t, 999 - t]), states)

    before = output()
    adapters.add(family, {"unet": spec}, seed=seed)
    try:
        assert torch.equal(output(), before)
    finally:
        adapters.remove(family)
    assert torch.equal(output(), before)


@given(spec=specs, seed=st.integers(0, 1000))
def test_merging_adds_the_change_and_unmerging_takes_it_away(family, pipeline, spec, seed):
    adapters.add(family, {"unet": spec}, seed=seed)
    try:
        stir(family, seed)
        with tempfile.TemporaryDirectory() as folder:
            inference.use_adapter(pipeline, save_adapter(family, folder))
    finally:
        adapters.remove(family)
    before = {id(layer): layer.get_base_layer().weight.clone() for layer in attach.layers(pipeline)}
    with inference.fused(pipeline):
        for layer in attach.layers(pipeline):
            merged = before[id(layer)] + layer.get_delta_weight("default")
            assert torch.allclose(layer.get_base_layer().weight, merged, atol=1e-6)
    for layer in attach.layers(pipeline):
        assert torch.equal(layer.get_base_layer().weight, before[id(layer)])
    inference.remove_adapter(pipeline)


def by_hand(name: str, k: int, warmup: int, total: int, cycles: int, power: float) -> float:
    """The factor of step k by the formulas of the schedules."""
    if name == "constant":
        return 1.0
    if k < warmup:
        return k / max(1, warmup)
    if name == "constant_with_warmup":
        return 1.0
    done = (k - warmup) / max(1, total - warmup)
    if name == "linear":
        return max(0.0, 1 - done)
    if name == "cosine":
        return max(0.0, 0.5 * (1 + math.cos(math.pi * done)))
    if name == "cosine_with_restarts":
        return 0.0 if done >= 1 else 0.5 * (1 + math.cos(math.pi * ((cycles * done) % 1)))
    return 1e-7 if k > total else (1 - 1e-7) * (1 - done) ** power + 1e-7


@given(
    name=st.sampled_from(
        ["constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"]
    ),
    total=st.integers(2, 500), warmup=st.integers(0, 600), cycles=st.integers(1, 4), power=st.floats(0.5, 3),
    draw=st.data(),
)  # fmt: skip
def test_learning_rate_is_a_formula(name, total, warmup, cycles, power, draw):
    assume(warmup < total)
    config = TrainConfig(
        lr_scheduler=name, lr_warmup_steps=warmup, lr_num_cycles=cycles, lr_power=power
    )
    factor = learning_rate_factors(config, total)
    k = draw.draw(st.integers(0, total - 1))
    assert factor(k) == pytest.approx(by_hand(name, k, warmup, total, cycles, power), abs=1e-6)
    assert 0 <= factor(k) <= 1


@given(
    n=st.integers(1, 40),
    seed=st.integers(0, 2**31),
    positions=st.lists(st.integers(0, 10**6), max_size=20),
)
def test_the_row_of_a_position_does_not_depend_on_what_was_asked_before(n, seed, positions):
    alone = {p: data.row_at(p, n, seed) for p in sorted(positions)}
    assert [data.row_at(p, n, seed) for p in positions] == [alone[p] for p in positions]
    for p in positions:
        epoch = [data.row_at(p // n * n + i, n, seed) for i in range(n)]
        assert sorted(epoch) == list(range(n))


names = st.text(string.ascii_lowercase + "_", min_size=1, max_size=20)


@given(
    spec=specs,
    rate=st.floats(0, 1),
    seed=st.none() | st.integers(0, 2**31),
    prompts=st.lists(st.text(max_size=20)),
    stray=names,
)
def test_a_config_comes_back_from_json_and_a_stray_key_is_named(spec, rate, seed, prompts, stray):
    config = TrainConfig(
        lora={"unet": spec}, learning_rate=rate, seed=seed, validation_prompts=tuple(prompts)
    )
    assert TrainConfig.from_json(config.to_json()) == config
    values = config.to_dict()
    for place, inside in (
        (values, values),
        (values, values["data"]),
        (values, values["lora"]["unet"]),
    ):
        assume(stray not in inside)
        inside[stray] = 1
        with pytest.raises(ConfigError, match=stray):
            TrainConfig.from_dict(place)
        del inside[stray]


words = st.lists(st.sampled_from("a red cat on the green mat".split()), max_size=14).map(" ".join)


@given(captions=st.lists(words, min_size=1, max_size=6), limit=st.integers(3, 12))
def test_the_token_report_counts_what_the_tokenizer_cuts(captions, limit):
    tokenizer = words_tokenizer(limit)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        for i in range(len(captions)):
            picture(root / f"{i}.png", seed=i)
        metadata(root, *({"file_name": f"{i}.png", "text": c} for i, c in enumerate(captions)))
        report = data.scan(DataSpec(train_data_dir=folder, resolution=48), tokenizer=tokenizer)
    whole = tokenizer(captions).input_ids
    cut = tokenizer(captions, truncation=True).input_ids
    lost = sum(len(a) > len(b) for a, b in zip(whole, cut, strict=True))
    said = [p.where for p in report.problems if "does not see" in p.what]
    assert said == ([f"{lost} of {len(captions)} captions"] if lost else [])


MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16", "F", "YCbCr")


@given(
    mode=st.sampled_from(MODES),
    width=st.integers(1, 70),
    height=st.integers(1, 70),
    seed=st.integers(0, 99),
    side=st.sampled_from([8, 31, 64]),
)
def test_any_mode_and_size_becomes_a_square_of_pixels(mode, width, height, seed, side):
    draw = np.random.default_rng(seed)
    if mode == "I;16":
        image = Image.fromarray(draw.integers(0, 65536, (height, width), dtype=np.uint16))
    elif mode == "F":
        image = Image.fromarray(draw.random((height, width), dtype=np.float32))
    else:
        values = draw.integers(0, 256, (height, width, 4), dtype=np.uint8)
        image = Image.fromarray(values)  # RGBA, from which some modes are reached by RGB only
        image = (image.convert("RGB") if mode in ("CMYK", "P", "YCbCr", "1") else image).convert(
            mode
        )
    stream = io.BytesIO()
    image.save(stream, "TIFF" if mode in ("CMYK", "F", "YCbCr") else "PNG")
    rgb = decode(stream.getvalue()).image
    assert (rgb.mode, rgb.size) == ("RGB", (width, height))
    pixels = data.pixels(rgb, DataSpec(resolution=side, random_flip=True), seed, seed)
    assert pixels.shape == (3, side, side)
    assert pixels.dtype == torch.float32
    assert -1 <= pixels.min() <= pixels.max() <= 1


@given(n=st.integers(2, 6), cuts=st.lists(st.integers(1, 5), max_size=3), seed=st.integers(0, 99))
def test_splitting_a_batch_gives_the_same_gradient(family, n, cuts, seed):
    draw = torch.Generator().manual_seed(seed)
    mean, std = torch.randn(n, 4, 8, 8, generator=draw), torch.full((n, 4, 8, 8), 0.1)
    captions = [f"picture {i}" for i in range(n)]

    def gradient(parts: list[range]) -> list[torch.Tensor]:
        for weight in adapters.parameters(family)["unet"]:
            weight.grad = None
        for part in parts:
            rows = list(part)
            batch = Batch.of_captions([captions[i] for i in rows], 16, seed)
            batch = dataclasses.replace(batch, positions=rows, moments=(mean[rows], std[rows]))
            (diffusion_loss(family, batch).loss * len(rows) / n).backward()
        return [weight.grad.clone() for weight in adapters.parameters(family)["unet"]]

    adapters.add(family, {"unet": LoraSpec(rank=2, target_modules=("to_q", "to_v"))}, seed=seed)
    try:
        stir(family, seed)
        edges = sorted({0, n, *(cut for cut in cuts if cut < n)})
        whole = gradient([range(n)])
        split = gradient([range(a, b) for a, b in itertools.pairwise(edges)])
        for a, b in zip(whole, split, strict=True):
            assert torch.allclose(a, b, atol=1e-6, rtol=1e-4)
    finally:
        adapters.remove(family)


@given(
    steps=st.lists(st.integers(1, 60), min_size=1, max_size=7, unique=True),
    limit=st.none() | st.integers(1, 4),
    best=st.integers(0, 60),
)
def test_pruning_keeps_the_best_and_the_newest(steps, limit, best):
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder)
        for step in sorted(steps):
            checkpoint.save_checkpoint(run, step, {"a": torch.ones(1)}, {"run": "r"})
        checkpoint.prune(run, limit, keep={best})
        left = sorted(int(p.name.split("-")[1]) for p in run.glob("checkpoint-*"))
        others = sorted(set(steps) - {best})
        wanted = others if limit is None else others[-limit:]
        assert left == sorted({*wanted, *({best} & set(steps))})
        assert checkpoint.latest(run).step == max(left)


tensors = st.dictionaries(
    st.text(string.ascii_letters + "/._", min_size=1, max_size=12),
    st.tuples(st.lists(st.integers(0, 4), max_size=3), st.sampled_from([torch.float32, torch.int64, torch.bfloat16])),
    min_size=1, max_size=5,
)  # fmt: skip
values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**40), 2**40)
    | st.floats(allow_nan=False)
    | st.text(max_size=9),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=8,
)


@given(shapes=tensors, best=values, step=st.integers(0, 10**9))
def test_a_checkpoint_comes_back_bit_for_bit(shapes, best, step):
    draw = torch.Generator().manual_seed(step % 1000)
    state = {
        k: (100 * torch.randn(shape, generator=draw)).to(kind)
        for k, (shape, kind) in shapes.items()
    }
    with tempfile.TemporaryDirectory() as folder:
        checkpoint.save_checkpoint(Path(folder), step, state, {"run": "r", "best": best})
        back = checkpoint.latest(Path(folder))
    assert (back.step, back.meta["best"]) == (step, best)
    assert back.tensors.keys() == state.keys()
    assert all(
        torch.equal(back.tensors[k], state[k]) and back.tensors[k].dtype == state[k].dtype
        for k in state
    )


secrets = st.one_of(
    st.text(string.ascii_letters + string.digits, min_size=20, max_size=40).map(
        lambda s: f"hf_{s}"
    ),
    st.text(string.ascii_letters + string.digits, min_size=20, max_size=40).map(
        lambda s: f"sk-{s}"
    ),
    st.text(string.ascii_letters + string.digits, min_size=30, max_size=36).map(
        lambda s: f"ghp_{s}"
    ),
    st.text(string.ascii_lowercase, min_size=6, max_size=9).map(lambda s: f"/home/{s}x9/pictures"),
)


@given(
    secret=secrets,
    before=st.text(max_size=30),
    after=st.text(max_size=30),
    sign=st.sampled_from(list(" '\"=:,;/()<>\n")),
)
def test_redaction_leaks_no_canary_whatever_stands_around_it(secret, before, after, sign):
    hidden = redacted(before + sign + secret + sign + after)
    kernel = secret.split("/")[2] if secret.startswith("/") else secret[4:]
    assume(kernel not in before + after)
    assert kernel not in hidden


@given(value=values)
def test_any_json_value_is_captions_or_one_problem(value):
    value = json.loads(json.dumps(value))
    problems = Problems()
    captions = captions_of(value, "line 1", problems)
    assert (captions is None) == (len(problems) == 1)
    if captions is not None:
        assert captions
        assert list(captions) == (value if isinstance(value, list) else [value])


@given(
    seed=st.integers(0, 999),
    quality=st.integers(60, 95),
    side=st.integers(64, 200),
    n=st.integers(1, 5),
)
def test_a_picture_saved_again_is_seen_among_others(seed, quality, side, n):
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        for i in range(n):
            draw = np.random.default_rng([seed, i]).integers(0, 256, (6, 6, 3), dtype=np.uint8)
            image = Image.fromarray(draw).resize((128, 128), Image.Resampling.BICUBIC)
            image.save(root / f"{i}.png")
        image.resize((side, side), Image.Resampling.LANCZOS).save(
            root / "again.jpg", quality=quality
        )
        files = [*(f"{i}.png" for i in range(n)), "again.jpg"]
        metadata(root, *({"file_name": name, "text": "x"} for name in files))
        found = [(p.where, p.what) for p in doctor(root).problems if "almost" in p.what]
    assert found == [("again.jpg", f"looks almost like {n - 1}.png")]
