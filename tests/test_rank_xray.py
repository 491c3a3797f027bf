"""Which rank was needed: cut as an independent SVD cuts, and every number is of those pictures and losses."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

import lora_nb
from lora_nb import adapters, formats, inference, metrics, plots
from lora_nb.config import DataSpec, LoraSpec, TrainConfig
from lora_nb.errors import CheckpointError, ConfigError
from lora_nb.families import load_family, tiny
from lora_nb.formats import Pair
from lora_nb.metrics import Score
from lora_nb.probe import Paired, Probe
from lora_nb.rank_study import AtRank, RankStudy, which_rank
from lora_nb.run_folder import save_config

NAMES = ("fox", "cat", "anchor", "house")
SAMPLING = {"num_inference_steps": 2, "guidance_scale": 1.0}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny.build("sd", tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    for split in ("train", "validation"):
        (folder / split).mkdir()
        lines = []
        for i, name in enumerate(NAMES):
            image = Image.new("RGB", (32, 32), "white")
            ImageDraw.Draw(image).ellipse((4, 4, 20 + 2 * i, 27), fill=(60 * i, 90, 200))
            image.save(folder / split / f"{i}.png")
            line = {"file_name": f"{i}.png", "text": f"{name}, ink style", "concept": name}
            lines.append(json.dumps(line))
        (folder / split / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def lora(base):
    """Rank 4 in every layer, with singular values 8, 4, 2, 1 times a size, at a scale that is not 1."""
    family, weights = load_family("auto", str(base)), {}
    g = torch.Generator().manual_seed(0)
    for name, layer in adapters.adaptable(family.unet).items():
        if any(adapters.matches(name, t) for t in family.targets["unet"]):
            u, v = (torch.linalg.qr(torch.randn(n, 4, generator=g))[0] for n in layer.weight.shape)
            size = 0.5 * torch.rand(1, generator=g)
            values = size * torch.tensor([8.0, 4.0, 2.0, 1.0])
            weights.setdefault("unet", {})[name] = Pair(v.T.contiguous(), u * values / 3, 3.0)
    return weights


@pytest.fixture(scope="module")
def run(base, pictures, tmp_path_factory):
    """A run's folder with that LoRA as its file."""
    folder = tmp_path_factory.mktemp("run")
    config = TrainConfig(
        pretrained_model_name_or_path=str(base),
        data=DataSpec(train_data_dir=str(pictures), resolution=16),
        lora={"unet": LoraSpec(rank=4)},
        output_dir=str(folder),
        train_batch_size=2,
        seed=0,
    )
    save_config(config)
    formats.save_weights(lora(base), folder / formats.FILE_NAME)
    return folder


@pytest.fixture(scope="module")
def study(run):
    return which_rank(run, ranks=(1, 2, 8), pictures=3, **SAMPLING)


def cut(base, rank):
    """The base with the first singular values of each full matrix scale B A added to its weights."""
    family = load_family("auto", str(base))
    layers = adapters.adaptable(family.unet)
    for name, pair in lora(base)["unet"].items():
        u, s, vh = torch.linalg.svd(pair.delta())
        layers[name].weight.data += u[:, :rank] * s[:rank] @ vh[:rank]
    return family


def test_ranks_and_energy(study):
    """Ranks that the file has not are left out, its own is the last; 64, 16, 4 and 1 of 85 are the squares."""
    assert [row.rank for row in study.rows] == [0, 1, 2, 4]
    assert [row.energy for row in study.rows] == pytest.approx([0, 64 / 85, 80 / 85, 1], abs=1e-6)


@pytest.mark.parametrize("place", range(4))
def test_pictures_and_loss_are_those_of_the_cut(base, pictures, study, place):
    row = study.rows[place]
    family = cut(base, row.rank)
    expected = inference.generate(family.pipeline(), list(study.prompts), [0, 1, 2], **SAMPLING)
    for ours, theirs in zip(row.pictures, expected, strict=True):
        assert np.abs(np.asarray(ours, int) - np.asarray(theirs, int)).max() <= 1
    spec = DataSpec(train_data_dir=str(pictures), resolution=16)
    probe = Probe(family, lora_nb.data.load(spec, "validation"), 24, 2, True)
    assert row.loss == pytest.approx(probe.untrained().loss, rel=1e-4)
    assert row.lost.mean == pytest.approx(row.loss - study.rows[-1].loss, abs=1e-6)


def test_judged_by_style_thing_and_distance(study):
    judge, whole = lora_nb.load_judge(), study.rows[-1]
    assert study.style == "ink"
    assert study.prompts == ("fox, ink style", "cat, ink style", "anchor, ink style")
    for row in study.rows:
        assert row.style == metrics.style_score(row.pictures, "ink", judge)
        assert row.concept == metrics.concept_score(row.pictures, NAMES[:3], judge)
        assert row.moved == metrics.drift(whole.pictures, row.pictures, judge)
    assert whole.moved.mean == pytest.approx(0, abs=1e-6)
    assert study.rows[0].moved.mean > 1e-3


def test_table_and_page(study):
    lines = repr(study).splitlines()
    assert [line.split()[0] for line in lines[1:5]] == ["base", "1", "2", "4"]
    assert "94%" in lines[3]
    assert study._repr_html_().count("<tr>") == 5


def test_figure_shows_the_numbers(study):
    figure = plots.rank_study(study, shown=2)
    shares, losses, *pictures = figure.axes
    energy = next(line for line in shares.lines if line.get_label() == "energy")
    assert list(energy.get_ydata()) == [row.energy for row in study.rows]
    assert list(losses.containers[0].lines[0].get_ydata()) == [r.lost.mean for r in study.rows]
    assert len(pictures) == 2 * len(study.rows)
    assert np.array_equal(pictures[1].images[0].get_array(), study.rows[0].pictures[1])


def test_without_held_out_pictures_and_unknown_to_the_judge(run, pictures, tmp_path):
    """Training captions are drawn then, and nothing is claimed that was not measured."""
    own = tmp_path / "own"
    own.mkdir()
    for i in range(2):
        Image.open(pictures / "train" / f"{i}.png").save(own / f"{i}.png")
        (own / f"{i}.txt").write_text(f"my thing {i}")
    config = lora_nb.read_config(run)
    data = dataclasses.replace(config.data, train_data_dir=str(own))
    save_config(dataclasses.replace(config, data=data, output_dir=str(tmp_path)))
    (tmp_path / formats.FILE_NAME).write_bytes((run / formats.FILE_NAME).read_bytes())
    study = which_rank(tmp_path, ranks=(1,), **SAMPLING)
    assert study.prompts == ("my thing 0", "my thing 1")
    assert {(row.style, row.concept, row.loss, row.lost) for row in study.rows} == {(None,) * 4}
    assert (study.needed(), study.alike()) == (None, None)
    assert "Nothing here can be judged" in repr(study)
    assert len(plots.rank_study(study).axes) == 1 + 2 * 3


def rows(losses, styles):
    """Rows of ranks 0, 1, 2, ... with these losses and shares of style."""
    return RankStudy(
        tuple(
            AtRank(
                rank, 0.0, [], Score(0, 0, 0, 2), Score(style, style - 0.1, style + 0.1, 9),
                loss=loss, lost=Paired(loss - losses[-1], 0.01, 9),
            )
            for rank, (loss, style) in enumerate(zip(losses, styles, strict=True))
        ),
        (),
        "ink",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("losses", "keep", "rank"),
    [
        ((1.0, 0.9, 0.81, 0.8), 0.95, 2),
        ((1.0, 0.9, 0.81, 0.8), 0.96, 3),
        ((1.0, 0.7, 0.75, 0.8), 0.95, 1),  # a smaller rank may be better than the whole
        ((1.0, 1.1, 1.1, 1.2), 0.95, None),  # nothing was gained
    ],
)
def test_the_rank_that_was_needed(losses, keep, rank):
    assert rows(losses, [0.5] * 4).needed(keep) == rank


def test_the_rank_from_which_pictures_are_alike():
    assert rows([1.0] * 4, [0.0, 0.6, 0.72, 0.8]).alike() == 2


def test_no_run_and_no_rank(run, tmp_path):
    with pytest.raises(CheckpointError, match="no run"):
        which_rank(tmp_path)
    with pytest.raises(ConfigError, match="ranks is"):
        which_rank(run, ranks=(0, 2))
