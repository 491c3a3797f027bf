"""Every exercise: the right answer passes, usual mistakes are refused with their reason, gaps get the hint.

Right answers are written out here as a learner would write them, apart from the references.
"""

import math

import pytest
import torch

from lora_nb import checks
from lora_nb.checks import EXERCISES, WrongAnswer, check
from lora_nb.families import load_family, tiny


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    return load_family("sd", str(tiny.build("sd", tmp_path_factory.mktemp("tiny"))))


@pytest.fixture
def given(family):
    """What the notebooks hand over, by exercise."""
    return {
        "00.1": {"family": family},
        "01.1": {"family": family},
        "01.2": {"tokenizer": family.tokenizer},
        "08.1": {"family": family},
    }


def right_answers(family):
    unet = family.unet
    attention = [
        m for n, m in unet.named_modules() if n.endswith(("to_q", "to_k", "to_v", "to_out.0"))
    ]
    lora = sum(4 * (m.in_features + m.out_features) for m in attention)

    def learning_rate(step, peak, warmup, total):
        if step < warmup:
            return peak * step / warmup
        return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (total - warmup)))

    def stretch(rates, peak):
        n = len(rates)
        return math.pi * (n - 1) / n / math.acos(2 * rates[-1] / peak - 1)

    def early_stop(differences, patience):
        best = 0
        for place, value in enumerate(differences):
            if value < differences[best]:
                best = place
            if place - best >= patience:
                break
        return best, place

    return {
        "00.1": sum(p.numel() for p in unet.parameters()) / lora,
        "11.1": lambda major, minor: "bfloat16" if major >= 8 else "float16",
        "11.2": lambda frozen, trained, per_picture, batch: (
            2 * frozen + 16 * trained + batch * per_picture
        ),
        "00.2": lambda steps, batch, accumulation, pictures: (
            steps * batch * accumulation / pictures
        ),
        "01.1": lambda height, width: (4, height // 2, width // 2),
        "01.2": lambda caption: len(family.tokenizer(caption).input_ids) > 16,
        "01.3": lambda x0, noise, bar: bar**0.5 * x0 + (1 - bar) ** 0.5 * noise,
        "02.1": lambda rank, inputs, outputs: rank * (inputs + outputs),
        "02.2": lambda x, w, a, b, alpha, rank: x @ w.T + alpha / rank * (x @ a.T) @ b.T,
        "02.3": 16,
        "03.1": lambda snr, gamma: torch.minimum(snr, torch.tensor(gamma)) / (snr + 1),
        "03.2": lambda x0, noise, bar: bar**0.5 * noise - (1 - bar) ** 0.5 * x0,
        "03.3": learning_rate,
        "04.1": lambda w, a, b, alpha, rank: w + alpha / rank * b @ a,
        "04.2": 0.0,
        "05.1": lambda ranks, behind, errors: min(
            r for r, b, e in zip(ranks, behind, errors, strict=True) if b <= 2 * e
        ),
        "05.2": lambda learning_rate, alpha, new_alpha: learning_rate * alpha / new_alpha,
        "05.3": early_stop,
        "06.1": lambda errors, weight: (
            errors[: len(errors) // 2].mean() + weight * errors[len(errors) // 2 :].mean()
        ),
        "06.2": lambda before, after: (
            1 - (before * after).sum(1) / (before.norm(dim=1) * after.norm(dim=1))
        ),
        "07.1": lambda a1, a2: (
            torch.linalg.svdvals(
                torch.linalg.svd(a1, full_matrices=False).Vh
                @ torch.linalg.svd(a2, full_matrices=False).Vh.T
            )
            .square()
            .mean()
        ),
        "07.2": lambda b1, s1, b2, s2, weights: torch.hstack(
            [b1 * s1 * weights[0], b2 * s2 * weights[1]]
        ),
        "07.3": lambda a1, b1, a2, b2: -(b1 - b2) @ (a1 - a2) / 4,
        "08.1": lambda part, layer: (
            {"unet": "lora_unet_", "text_encoder": "lora_te_text_model_"}[part]
            + layer.removeprefix("text_model.").replace(".", "_")
        ),
        "08.2": lambda rank, alpha, rslora: alpha * rank**0.5 if rslora else alpha,
        "08.3": lambda values, share: (
            1
            + sum(
                sum(v * v for v in values[:n]) < share * sum(v * v for v in values)
                for n in range(1, len(values))
            )
        ),
        "09.1": ["condition", "x0", "target", "call", "condition"],
        "09.2": lambda x_t, velocity, sigma: x_t - sigma * velocity,
        "09.3": lambda network, x_t, t: -network(x_t, (1000 - t) / 1000),
        "10.1": lambda x: math.ulp(x) * 2.0**45,  # a double has 45 bits more
        "10.2": stretch,
        "10.3": lambda rows, n: sum(row in rows[k - k % n : k] for k, row in enumerate(rows)),
    }


@pytest.mark.parametrize("name", EXERCISES)
def test_right_answers_pass_softly_and_strictly(name, family, given, capsys):
    answer = right_answers(family)[name]
    assert check(name, answer, **given.get(name, {}))
    assert capsys.readouterr().out == f"{name} right: {EXERCISES[name].right}\n"
    assert check(name, answer, strict=True, **given.get(name, {}))


@pytest.mark.parametrize("name", EXERCISES)
def test_usual_mistakes_are_refused_with_their_reason(name, given, capsys):
    given = given.get(name, {})
    mistakes = EXERCISES[name].task(**given).mistakes
    assert mistakes
    for sentence, mistake in mistakes.items():
        assert not check(name, mistake, **given)
        line = capsys.readouterr().out
        assert line.startswith(f"{name} expected ")
        assert f"({sentence})" in line
        with pytest.raises(WrongAnswer, match=f"{name} expected"):
            check(name, mistake, strict=True, **given)


@pytest.mark.parametrize("name", EXERCISES)
def test_open_answers_get_the_hint(name, given, capsys):
    given = given.get(name, {})

    def raises(*_):
        raise NotImplementedError

    is_function = callable(EXERCISES[name].task(**given).reference)
    stubs = [lambda *_: None, lambda *_: ..., raises] if is_function else []
    for stub in [None, ..., *stubs]:
        assert not check(name, stub, **given)
        assert capsys.readouterr().out == f"{name} not yet: {EXERCISES[name].hint}\n"


@pytest.mark.parametrize("name", EXERCISES)
def test_nonsense_is_refused_and_never_raises(name, given, capsys):
    given = given.get(name, {})
    nonsense = [
        "4",
        [1, 2],
        torch.zeros(3),
        float("nan"),
        lambda *_: "x",
        lambda *_: torch.zeros(7),
    ]
    for answer in [*nonsense, lambda *_: 1 / 0, lambda: 1]:
        assert not check(name, answer, **given)
        assert " expected " in capsys.readouterr().out


def test_other_wrong_answers_are_refused(given):
    transposed = torch.nn.functional.linear
    wrong = {
        "00.1": 1.1 * right_ratio(given),
        "00.2": lambda steps, batch, accumulation, pictures: steps // pictures,
        "01.1": lambda height, width: (3, height, width),
        "01.2": lambda caption: len(caption) > 77,
        "01.3": lambda x0, noise, bar: x0 + (1 - bar) ** 0.5 * noise,
        "02.1": lambda rank, inputs, outputs: inputs * outputs,
        "02.2": lambda x, w, a, b, alpha, rank: transposed(x, w),
        "02.3": 8,
        "03.1": lambda snr, gamma: torch.ones_like(snr),
        "03.2": lambda x0, noise, bar: noise - x0,
        "03.3": lambda step, peak, warmup, total: peak,
        "04.1": lambda w, a, b, alpha, rank: w + rank / alpha * b @ a,
        "04.2": 0.5,
        "05.1": lambda ranks, behind, errors: max(ranks),
        "05.2": lambda learning_rate, alpha, new_alpha: learning_rate / new_alpha,
        "05.3": lambda differences, patience: (0, patience),
        "06.1": lambda errors, weight: errors.mean() * (1 + weight),
        "06.2": lambda before, after: (before - after).square().mean(1),
        "07.1": lambda a1, a2: 1.0,
        "07.2": lambda b1, s1, b2, s2, weights: torch.cat([b1, b2], dim=1),
        "07.3": lambda a1, b1, a2, b2: b1 @ a2 + b2 @ a1,
        "08.1": lambda part, layer: layer,
        "08.2": lambda rank, alpha, rslora: alpha / rank,
        "08.3": lambda values, share: len(values),
        "09.1": ("call", "call", "call", "call", "call"),
        "09.2": lambda x_t, velocity, sigma: (1 - sigma) * x_t - sigma * velocity,
        "09.3": lambda network, x_t, t: network(x_t, t),
        "10.1": lambda x: 2.0**-10,
        "10.2": lambda rates, peak: peak / rates[-1],
        "10.3": lambda rows, n: len(rows) % n,
        "11.1": lambda major, minor: "float32",
        "11.2": lambda frozen, trained, per_picture, batch: batch * per_picture,
    }
    assert wrong.keys() == EXERCISES.keys()
    for name, answer in wrong.items():
        assert not check(name, answer, **given.get(name, {})), name


def right_ratio(given):
    return EXERCISES["00.1"].task(**given["00.1"]).reference


def test_what_is_said(capsys):
    check("02.1", lambda rank, inputs, outputs: 7)
    assert capsys.readouterr().out == "02.1 expected 4352, got 7\n"
    check("02.1", 3)
    assert capsys.readouterr().out == "02.1 expected a function, got 3\n"
    check("01.3", lambda *_: 1 / 0)
    assert "got ZeroDivisionError: division by zero" in capsys.readouterr().out
    check("01.3", lambda x0, noise, bar: x0[0])
    assert "expected tensor of shape (2, 4, 3, 3)" in (line := capsys.readouterr().out)
    assert "got tensor of shape (4, 3, 3)" in line
    check("02.3", 5)
    assert "16" not in capsys.readouterr().out.removeprefix("02.3")  # not given away


def test_an_answer_cannot_change_the_inputs_it_is_compared_on():
    def in_place(x0, noise, bar):
        x0.mul_(0)
        return x0

    assert not check("01.3", in_place)


def test_unknown_exercises_are_named():
    with pytest.raises(WrongAnswer, match=r"no exercise '9\.9'; there are 00\.1, "):
        check("9.9", 1)


def test_a_check_leaves_the_random_state_alone(family, given):
    before = torch.random.get_rng_state()
    for name, answer in right_answers(family).items():
        check(name, answer, **given.get(name, {}))
    assert torch.equal(before, torch.random.get_rng_state())
    assert len(checks.EXERCISES) >= 18
