"""The judge that ships, on real drawings that it has never seen, and the scores that use it."""

import json

import numpy as np
import pytest
from PIL import Image, ImageFilter

from lora_nb import data, load_judge, metrics
from lora_nb.config import DataSpec
from lora_nb.env import data_dir
from lora_nb.errors import DataError, ModelError
from lora_nb.judge import SIZE, to_pixels

STYLES = ("ink", "clay")


@pytest.fixture(scope="module")
def judge():
    return load_judge()


@pytest.fixture(scope="module", params=STYLES)
def held_out(request):
    """A style's validation drawings with the names of their things; the judge has seen none of them."""
    loaded = data.load(DataSpec(train_data_dir=str(data_dir() / request.param)), "validation")
    pictures = [loaded.image(row.index) for row in loaded.rows]
    return request.param, pictures, [row.extra["concept"] for row in loaded.rows]


def test_card_says_what_the_shipped_weights_do_on_the_held_out_drawings(judge, held_out):
    style, pictures, names = held_out
    card = judge.card["held_out"]["drawings"][style]
    assert card["pictures"] == len(pictures) == 60
    found = metrics.style_score(pictures, style, judge)
    # PNG files hold the drawings exactly, so only rounding could tell the two ways apart
    assert found.mean == pytest.approx(card["style_accuracy"], abs=1 / 60)
    assert metrics.concept_score(pictures, names, judge).mean == pytest.approx(
        card["concept_top5"], abs=1 / 60
    )


def test_real_drawings_of_the_new_styles_are_told_apart(judge, held_out):
    style, pictures, _ = held_out
    other = STYLES[1 - STYLES.index(style)]
    # 100 % of ink and 85 % of clay (90 % before the judge knew more things); the rest of clay is taken for a base
    # style, most for flat, which draws the same outlines, and never for ink
    assert metrics.style_score(pictures, style, judge).mean >= {"ink": 0.95, "clay": 0.9}[style]
    assert metrics.style_score(pictures, other, judge).high < 0.1


def test_wrong_names_rank_low(judge, held_out):
    _, pictures, names = held_out
    wrong = names[1:] + names[:1]
    right, shifted = (metrics.concept_score(pictures, n, judge) for n in (names, wrong))
    assert shifted.high < right.low


def test_probabilities_and_ranks_are_well_formed(judge, held_out):
    _, pictures, names = held_out
    p = judge.style_probabilities(pictures)
    assert p.shape == (60, len(judge.styles))
    assert p.sum(axis=1) == pytest.approx(1, abs=1e-5)
    ranks = judge.concept_ranks(pictures, names)
    assert ranks.min() >= 1
    assert ranks.max() <= len(judge.names)
    features = judge.features(pictures)
    assert np.linalg.norm(features, axis=1) == pytest.approx(1, abs=1e-5)


def test_a_picture_is_judged_alone(judge, held_out):
    _, pictures, names = held_out
    assert judge.concept_ranks(pictures[:9], names[:9]).tolist() == [
        judge.concept_ranks([picture], [name])[0]
        for picture, name in zip(pictures[:9], names[:9], strict=True)
    ]


def test_other_sizes_and_modes_become_the_same_pixels():
    picture = Image.new("RGB", (SIZE, SIZE), (255, 0, 0))
    pixels = to_pixels([picture, picture.resize((512, 512)), picture.convert("P")])
    assert pixels.shape == (3, 3, SIZE, SIZE)
    assert pixels[1:].numpy() == pytest.approx(np.stack([pixels[0].numpy()] * 2))
    assert pixels[0, :, 0, 0].tolist() == [1, -1, -1]


def test_subject_and_drift_follow_likeness(judge, held_out):
    _, pictures, _ = held_out
    subject, others = pictures[:4], pictures[20:40]
    itself = metrics.subject_score(subject, subject, judge)
    assert itself.mean > metrics.subject_score(others, subject, judge).mean
    blurred = [picture.filter(ImageFilter.GaussianBlur(1)) for picture in others]
    assert metrics.drift(others, others, judge).mean == pytest.approx(0, abs=1e-5)
    small = metrics.drift(others, blurred, judge).mean
    assert 0 < small < metrics.drift(others, pictures[:20], judge).mean


def test_questions_that_have_no_answer_are_refused(judge, held_out):
    _, pictures, names = held_out
    with pytest.raises(DataError, match="does not know the style 'oil'"):
        metrics.style_score(pictures, "oil", judge)
    with pytest.raises(DataError, match="not taught 'perpetuum mobile'"):
        metrics.concept_score(pictures[:1], ["perpetuum mobile"], judge)
    with pytest.raises(DataError, match="2 pictures but 1 names"):
        metrics.concept_score(pictures[:2], names[:1], judge)
    with pytest.raises(DataError, match="no pictures"):
        metrics.style_score([], "ink", judge)
    with pytest.raises(DataError, match="compared in pairs"):
        metrics.drift(pictures[:2], pictures[:1], judge)


def test_missing_judge_is_one_sentence(tmp_path):
    with pytest.raises(ModelError, match=r"no judge\.json"):
        load_judge(tmp_path)


def test_files_are_small_and_carry_their_licence():
    folder = data_dir() / "judge"
    assert sum(file.stat().st_size for file in folder.iterdir()) < 10e6
    assert "MIT" in (folder / "README.md").read_text()
    assert json.loads((folder / "judge.json").read_text())["held_out"]
