"""Adapters that change places, scales by block, schedulers by name, and forecasts of what adapters share."""

import gc

import numpy as np
import psutil
import pytest
import torch
from peft import LoraConfig
from PIL import Image

from lora_nb import adapters, formats, inference, plots
from lora_nb.errors import ConfigError, DataError, FormatError
from lora_nb.families import load_family, tiny
from lora_nb.formats import Pair
from lora_nb.inference import attach


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny.build("sd", tmp_path_factory.mktemp("base"))


def file_of(base, folder, seed, **settings):
    """A LoRA of both parts with a stirred B; alpha differs from rank."""
    family = load_family("auto", str(base))
    generator = torch.Generator().manual_seed(seed)
    for part, module in family.trainable.items():
        config = {
            "r": 2,
            "lora_alpha": 1 + seed,
            "target_modules": list(family.targets[part]),
        } | settings
        module.add_adapter(LoraConfig(**config), adapter_name="default")
        for _, layer in adapters.layers(module):
            for weight in (layer.lora_A["default"].weight, layer.lora_B["default"].weight):
                weight.data = 0.2 * torch.randn(weight.shape, generator=generator)
    return formats.save_adapter(family, folder)


@pytest.fixture(scope="module")
def files(base, tmp_path_factory):
    """Three files: two of one shape, one with rsLoRA, and one of another rank."""
    folder = tmp_path_factory.mktemp("files")
    return {
        "a": file_of(base, folder / "a", 0),
        "b": file_of(base, folder / "b", 1),
        "rs": file_of(base, folder / "rs", 2, use_rslora=True),
        "wide": file_of(base, folder / "wide", 3, r=5),
    }


@pytest.fixture
def pipeline(base):
    return inference.load_pipeline(base)


@torch.no_grad()
def seen(pipeline) -> torch.Tensor:
    """What the network makes of fixed latents and text."""
    ids = torch.arange(32).view(2, 16) % 90
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    return pipeline.unet(x, torch.tensor([300, 40]), pipeline.text_encoder(ids)[0]).sample


def test_a_hundred_swaps_are_right_and_leave_no_memory(base, pipeline, files):
    """Alpha and rsLoRA change with the file, tensors stay where they are, and resident memory is flat."""
    expected = {n: seen(inference.load_pipeline(base, f)) for n, f in files.items() if n != "wide"}
    assert (expected["a"] - expected["b"]).abs().max() > 1e-2
    inference.use_adapter(pipeline, files["a"])
    places = {id(p): p.data_ptr() for p in pipeline.unet.parameters()}
    process, resident, tensors = psutil.Process(), [], []
    for i in range(100):
        name = ("b", "rs", "a")[i % 3]
        inference.swap_adapter(pipeline, files[name])
        assert torch.equal(seen(pipeline), expected[name]), i
        if i % 30 == 29:
            gc.collect()
            resident.append(process.memory_info().rss)
            tensors.append(sum(isinstance(o, torch.Tensor) for o in gc.get_objects()))
    assert {id(p): p.data_ptr() for p in pipeline.unet.parameters()} == places
    assert max(tensors) - min(tensors) <= 2
    assert max(resident) - min(resident) < 8e6
    assert inference.adapter_names(pipeline) == ["default"]


def test_a_swap_to_another_shape_makes_new_layers(base, pipeline, files):
    inference.use_adapter(pipeline, files["a"])
    taken = inference.swap_adapter(pipeline, files["wide"], scale=0.5)
    assert sum(taken.values()) == 80
    assert torch.equal(seen(pipeline), seen(inference.load_pipeline(base, files["wide"], 0.5)))
    inference.swap_adapter(pipeline, files["a"], name="second")  # there is none of that name yet
    assert inference.adapter_names(pipeline) == ["default", "second"]


def test_a_swap_that_is_refused_changes_nothing(pipeline, files, tmp_path):
    inference.use_adapter(pipeline, files["a"])
    before = seen(pipeline)
    (tmp_path / "x.safetensors").write_bytes(b"garbage")
    with pytest.raises(FormatError):
        inference.swap_adapter(pipeline, tmp_path / "x.safetensors")
    assert torch.equal(seen(pipeline), before)


def test_two_adapters_with_weights_are_their_weighted_sum(base, pipeline, files):
    """On the pipeline, and concatenated into one file."""
    inference.use_adapter(pipeline, files["a"], "a", 0.7)
    inference.use_adapter(pipeline, files["wide"], "wide", -0.4)
    total = formats.add([formats.read_weights(files[n]) for n in ("a", "wide")], [0.7, -0.4])
    other = inference.load_pipeline(base)
    modules = {part: getattr(other, part) for part in total}
    formats.merge(modules, total)
    assert (seen(pipeline) - seen(other)).abs().max() < 5e-6
    inference.set_scale(pipeline, {"a": 0.0, "wide": 0.0})
    assert torch.equal(seen(pipeline), seen(inference.load_pipeline(base)))


def test_scale_by_block(pipeline, files):
    """The longest name counts, others keep 1; each layer's factor is looked at."""
    inference.use_adapter(pipeline, files["a"])
    blocks = {"unet": 0.5, "unet.mid_block": 2.0, "text_encoder.encoder.layers.1": 0.0}
    inference.set_scale(pipeline, {"default": blocks})
    full = 1 / 2  # alpha / rank
    found = {}
    for part, name, layer in attach.named_layers(pipeline):
        found.setdefault(layer.scaling["default"] / full, set()).add(f"{part}.{name}")
    assert set(found) == {0.5, 2.0, 0.0, 1.0}
    assert all(".mid_block." in f".{n}." for n in found[2.0])
    assert all(n.startswith("unet.") and "mid_block" not in n for n in found[0.5])
    assert all(n.startswith("text_encoder.encoder.layers.1.") for n in found[0.0])
    assert all(n.startswith("text_encoder.encoder.layers.0.") for n in found[1.0])


def test_scale_of_a_block_that_is_not_there(pipeline, files):
    inference.use_adapter(pipeline, files["a"])
    before = seen(pipeline)
    with pytest.raises(ConfigError, match=r"no layer in unet\.middle"):
        inference.set_scale(pipeline, {"default": {"unet.middle": 0.5}})
    assert torch.equal(seen(pipeline), before)


def test_weight_grid_is_the_pictures_at_those_weights(base, pipeline, files):
    """Rows follow the first adapter; the corner is the base; the scales are afterwards as they were."""
    names = {"a": files["a"], "wide": files["wide"]}
    for name, file in names.items():
        inference.use_adapter(pipeline, file, name, 0.3)
    before = seen(pipeline)
    short = {"num_inference_steps": 2, "guidance_scale": 1.0}
    grid = inference.weight_grid(pipeline, "a fox", 3, {"a": [0, 1], "wide": [0, -0.5, 1]}, **short)
    assert torch.equal(seen(pipeline), before)
    for row, a in zip(grid, (0, 1), strict=True):
        for picture, wide in zip(row, (0, -0.5, 1), strict=True):
            other = inference.load_pipeline(base)
            for name, weight in (("a", a), ("wide", wide)):
                inference.use_adapter(other, names[name], name, weight)
            (expected,) = inference.generate(other, "a fox", 3, **short)
            apart = np.abs(np.asarray(picture, int) - np.asarray(expected, int)).max()
            assert apart <= 1  # merging rounds
    with pytest.raises(ConfigError, match="name two"):
        inference.weight_grid(pipeline, "a fox", 3, {"a": [0, 1]})


def test_fusing_is_undone_bit_for_bit_whatever_happens_inside(base, pipeline, files):
    inference.use_adapter(pipeline, files["a"], "a")
    inference.use_adapter(pipeline, files["rs"], "rs", -0.7)
    beside = seen(pipeline)

    def interrupted():
        with inference.fused(pipeline):
            assert (seen(pipeline) - beside).abs().max() < 1e-5
            raise KeyboardInterrupt

    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            interrupted()
    assert torch.equal(seen(pipeline), beside)
    inference.remove_adapter(pipeline)
    assert torch.equal(seen(pipeline), seen(inference.load_pipeline(base)))


# The moving picture of a training


def test_gif_has_a_frame_for_the_base_and_each_step(tmp_path):
    """In order of step, pictures in their places, a step that was cut short left out."""
    (tmp_path / "samples").mkdir()
    sets = {"base": 0, "step-000020": 80, "step-000100": 160, "step-000120": 240}
    for label, red in sets.items():
        for p, s in ((0, 0), (0, 1), (1, 0)):
            if (label, p) != ("step-000120", 1):
                picture = Image.new("RGB", (40, 40), (red, 100 * p, 100 * s))
                picture.save(tmp_path / "samples" / f"{label}-p{p}-s{s}.png")
    file = inference.gif(tmp_path, seconds=0.5, columns=2)
    assert file == tmp_path / "samples.gif"
    moving = Image.open(file)
    assert (moving.n_frames, moving.size) == (3, (80, 80 + 16))
    labels = set()
    for frame, red in enumerate((0, 80, 160)):
        moving.seek(frame)
        page = moving.convert("RGB")
        places = [page.getpixel(at) for at in ((20, 36), (60, 36), (20, 76))]
        assert places == [(red, 0, 0), (red, 0, 100), (red, 100, 0)]
        labels.add(page.crop((0, 0, 80, 16)).tobytes())
        assert moving.info["duration"] == (1500 if frame == 2 else 500)
    assert len(labels) == 3


def test_gif_of_a_run_without_samples(tmp_path):
    with pytest.raises(DataError, match="validation_prompts"):
        inference.gif(tmp_path)


# Schedulers


def test_schedulers_by_name(pipeline):
    """Each of them draws, and keeps the model's own noise schedule."""
    betas = pipeline.scheduler.config.beta_end
    names = inference.scheduler_names(pipeline)
    assert {"ddim", "euler", "euler_a", "dpm++", "unipc", "heun", "pndm"} <= set(names)
    assert not [n for n in names if n.startswith("flow")]
    drawn = {}
    for name in names:
        inference.set_scheduler(pipeline, name)
        assert pipeline.scheduler.config.beta_end == betas
        picture = inference.generate(pipeline, "a fox", 1, num_inference_steps=3)[0]
        drawn[name] = picture.tobytes()
    assert len(set(drawn.values())) > len(names) / 2  # some are equal where the steps are few


@pytest.mark.parametrize(
    ("name", "said"), [("flow_euler", "does not fit"), ("eular", "is unknown")]
)
def test_other_schedulers_are_refused(pipeline, name, said):
    before = pipeline.scheduler
    with pytest.raises(ConfigError, match=f"{said}.*ddim"):
        inference.set_scheduler(pipeline, name)
    assert pipeline.scheduler is before


# Singular values and overlaps


def pair(u, values, v):
    """The LoRA with these singular vectors and values, at a scale that is not 1."""
    return Pair((v * 2).float(), (u * values / 4).float(), 2.0)


def frames(seed, rows, columns, rank):
    g = torch.Generator().manual_seed(seed)
    u = torch.linalg.qr(torch.randn(rows, rank, generator=g, dtype=torch.float64))[0]
    v = torch.linalg.qr(torch.randn(columns, rank, generator=g, dtype=torch.float64))[0].T
    return u, v


def test_xray_finds_the_singular_values_that_were_put_in():
    u, v = frames(0, 20, 30, 4)
    values = torch.tensor([8.0, 4.0, 4.0, 0.0], dtype=torch.float64)
    weights = {"unet": {"down_blocks.1.attentions.0.to_q": pair(u, values, v)}}
    (found,) = formats.xray(weights)
    assert found.values == pytest.approx([8, 4, 4, 0], abs=1e-5)
    assert found.energy == pytest.approx([64 / 96, 80 / 96, 1, 1])
    assert found.effective_rank == pytest.approx(
        2**1.5, rel=1e-5
    )  # entropy of 1/2, 1/4, 1/4 is 1.5 bits
    assert (found.rank_for(0.6), found.rank_for(0.8), found.rank_for(0.99)) == (1, 2, 3)
    assert found.block == "unet.down_blocks.1"
    assert "unet.down_blocks.1" in formats.xray_table([found])
    axes = plots.rank_xray([found]).axes[0]
    assert axes.images[0].get_array()[0].tolist() == pytest.approx([64 / 96, 80 / 96, 1, 1])
    assert axes.lines[0].get_xdata()[0] == pytest.approx(found.effective_rank)


def test_overlap_of_planes_at_known_angles():
    """Inputs share one direction and meet at 60 degrees in the other; outputs have nothing in common."""
    e = torch.eye(12, dtype=torch.float64)
    values = torch.tensor([3.0, 1.0], dtype=torch.float64)
    turned = torch.stack([e[0], 0.5 * e[1] + 0.75**0.5 * e[2]])
    a = {"unet": {"x": pair(e[:, :2], values, e[:2])}}
    b = {"unet": {"x": pair(e[:, 4:6], values, turned), "y": pair(e[:, :2], values, e[:2])}}
    (found,) = formats.overlap(a, b)
    assert found.inputs == pytest.approx([1.0, 0.5], abs=1e-6)
    assert found.outputs == pytest.approx([0.0, 0.0], abs=1e-6)
    assert found.shared == pytest.approx((1 + 0.25) / 2 / 2, abs=1e-6)
    assert found.cosine == pytest.approx(0, abs=1e-6)
    assert found.chance == pytest.approx(2 / 12)


def test_overlap_with_itself_its_opposite_and_strangers():
    def lora(seed, sign=1.0):
        u, v = frames(seed, 200, 300, 4)
        return {"unet": {"x": pair(u, sign * torch.tensor([4.0, 3, 2, 1], dtype=torch.float64), v)}}

    (same,), (against,) = formats.overlap(lora(1), lora(1)), formats.overlap(lora(1), lora(1, -1.0))
    assert (same.shared, same.cosine) == pytest.approx((1, 1), abs=1e-5)
    assert (against.shared, against.cosine) == pytest.approx((1, -1), abs=1e-5)
    strangers = [formats.overlap(lora(i), lora(100 + i))[0] for i in range(20)]
    mean = sum(o.shared for o in strangers) / 20
    assert mean == pytest.approx(strangers[0].chance, rel=0.2)
    assert "mean of 20 layers" in formats.overlap_table(strangers)


def test_cosine_is_that_of_the_changes():
    (ua, va), (ub, vb) = frames(1, 10, 14, 3), frames(2, 10, 14, 2)
    a = {"unet": {"x": pair(ua, torch.tensor([3.0, 2, 1], dtype=torch.float64), va)}}
    b = {"unet": {"x": pair(ub, torch.tensor([1.0, 5], dtype=torch.float64), vb)}}
    da, db = (w["unet"]["x"].delta().flatten() for w in (a, b))
    (found,) = formats.overlap(a, b)
    assert found.cosine == pytest.approx(float(da @ db / da.norm() / db.norm()), abs=1e-6)


def test_overlap_figure_shows_the_mean_of_each_block():
    (u, v), (other, _) = frames(1, 10, 14, 3), frames(2, 10, 14, 3)
    values = torch.tensor([3.0, 2, 1], dtype=torch.float64)
    names = ("down_blocks.0.x", "up_blocks.1.x", "up_blocks.1.y", "mid_block.x")
    a = {"unet": {n: pair(u, values, v) for n in names}}
    b = {"unet": {n: pair(other if n.endswith("y") else u, values, v) for n in names}}
    found = {o.layer: o for o in formats.overlap(a, b)}
    axes = plots.overlap_bars(list(found.values())).axes[0]
    blocks = [label.get_text() for label in axes.get_yticklabels()]
    assert blocks == ["unet.down_blocks.0", "unet.mid_block", "unet.up_blocks.1"]
    half = (found["up_blocks.1.x"].shared + found["up_blocks.1.y"].shared) / 2
    assert [bar.get_width() for bar in axes.patches] == pytest.approx([1, 1, half], abs=1e-6)
    assert list(axes.lines[0].get_xdata()) == pytest.approx([(3 / 10 + 3 / 14) / 2] * 3)
