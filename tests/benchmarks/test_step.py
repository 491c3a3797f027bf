"""What a step costs, by counted work and ratios: nothing here knows how fast the machine is."""

import itertools
import sys
import time
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch.profiler import profile

from lora_nb import adapters, data
from lora_nb.cache import Cache
from lora_nb.config import DataSpec, LoraSpec
from lora_nb.data import Pictures, Row
from lora_nb.data.report import Report
from lora_nb.data.sources import FileSource
from lora_nb.families import REGISTRY, load_family
from lora_nb.trainer import train


def kernels(training):
    """How often each operator runs in one warm step."""
    steps = iter(training)
    for _ in range(2):  # the first looks at health, and fills the cache
        next(steps)
    with profile() as seen:
        training._step(training.done)
    steps.close()
    return Counter({event.key: event.count for event in seen.key_averages()})


def test_grouped_projections_take_fewer_products_and_passes(config):
    counts = {}
    for on in (False, True):
        run = config.replace(fused_lora=on, overwrite=True, max_train_steps=9, train_batch_size=8)
        training = train(run)
        counts[on] = kernels(training)
    for name in ("aten::mul", "aten::add", "aten::linear"):
        assert counts[True][name] < counts[False][name], name
    layers = len(list(adapters.layers(training.family.unet)))
    # peft takes three products for each layer; here layers share one, and no branch has one.
    assert counts[False]["aten::linear"] - counts[True]["aten::linear"] > 2 * layers


def test_a_warm_step_encodes_nothing_and_reads_no_picture(config, monkeypatch):
    training = train(config.replace(max_train_steps=9, random_flip=True))
    steps = iter(training)
    for _ in range(8):  # both mirrorings of all eight pictures need not have come yet
        next(steps)
    for position in range(200):
        training.cache.batch([position])
    for name in ("moments", "text_states", "picture_states"):
        monkeypatch.setattr(REGISTRY["sd"], name, None)
    monkeypatch.setattr(Pictures, "image", None)
    monkeypatch.setattr(Pictures, "sha256", None)
    assert next(steps).step == 9
    steps.close()


def many(count, file):
    """A data set of so many rows that are all the same picture."""
    spec = DataSpec(resolution=16)
    rows = [Row(i, f"{i}.png", str(file), ("a cat",), 16, 16) for i in range(count)]
    return Pictures(spec, Report(file.parent, rows, [], 0.0, ""), [FileSource(str(file))] * count)


def calls(function):
    """How many Python functions and library calls run inside."""
    counted = Counter()
    sys.setprofile(lambda frame, event, argument: counted.update([event]))
    try:
        function()
    finally:
        sys.setprofile(None)
    return counted["call"] + counted["c_call"]


@pytest.mark.parametrize("step", [None, 8])
def test_making_a_batch_costs_the_same_with_100_and_with_10_000_pictures(tiny_sd, tmp_path, step):
    Image.new("RGB", (16, 16)).save(tmp_path / "0.png")
    family, costs = load_family("sd", str(tiny_sd)), []
    for count in (100, 10_000):
        pictures = many(count, tmp_path / "0.png")
        spec = DataSpec(resolution=16, bucket_step=step)
        cache = Cache(family, pictures, spec, 3, batch_size=4)
        cache.batch([0, 1, 2, 3])  # the order of an epoch is drawn once
        costs.append(min(calls(lambda c=cache, p=p: c.batch([p, p + 1])) for p in (4, 8, 12)))
    assert costs[1] == pytest.approx(costs[0], rel=0.05)


def plain_loop(model, batch, width):
    """peft's own layers, cached latents and text, one optimizer: the least that a loop can do, as a generator."""
    family = load_family("sd", str(model))
    adapters.add(family, {"unet": LoraSpec(rank=2)})
    weights = adapters.parameters(family)["unet"]
    optimizer = torch.optim.AdamW(weights, fused=True)
    x0, states = torch.randn(batch, 4, width, width), torch.randn(batch, 16, 32)
    while True:
        noise, t = torch.randn_like(x0), family.objective.sample_t(torch.rand(batch))
        x_t = family.objective.add_noise(x0, noise, t)
        loss = F.mse_loss(family.predict(x_t, t, {"encoder_hidden_states": states}), noise)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        yield loss.item()


@pytest.mark.long
def test_records_checks_and_history_cost_little_beside_the_step(config):
    """Ours, with checks and a line in history.jsonl, against the least loop; CPU time, one step of each in turn."""
    # The bound is wide: the arithmetic of this base model is a tenth of that of a real one.
    ours = iter(train(config.replace(train_batch_size=8, max_train_steps=200, resolution=64)))
    loops = {"ours": ours, "plain": plain_loop(config.pretrained_model_name_or_path, 8, 32)}
    spent = {name: [] for name in loops}
    for _ in range(12):
        for name, loop in loops.items():
            began = time.process_time()
            next(loop)
            spent[name].append(time.process_time() - began)
    ours.close()
    assert min(spent["ours"]) < 1.5 * min(spent["plain"])


def test_an_epoch_is_drawn_once(monkeypatch):
    drawn = []
    draw = data.transforms.rng.permutation
    monkeypatch.setattr(data.transforms.rng, "permutation", lambda *a: drawn.append(a) or draw(*a))
    list(itertools.starmap(data.row_at, [(p, 50, 77) for p in range(100)]))
    assert len(drawn) == 2
