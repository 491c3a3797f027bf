"""The loop: schedules, accumulation, clipping, stopping, refusing; each against a formula or an uninterrupted run."""

import json
import math
import os
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from lora_nb import adapters, checkpoint, run_folder, trainer
from lora_nb.config import DataSpec, LoraSpec, TrainConfig
from lora_nb.errors import CheckpointError, ConfigError, DataError, LoraNbError, NumericsError
from lora_nb.optimization import learning_rate_factors
from lora_nb.trainer import train


@pytest.fixture
def config(tiny_sd, pictures, tmp_path):
    return TrainConfig(
        pretrained_model_name_or_path=str(tiny_sd),
        data=DataSpec(train_data_dir=str(pictures), resolution=16),
        lora={"unet": LoraSpec(rank=2)},
        output_dir=str(tmp_path / "run"),
        seed=3,
        train_batch_size=2,
        max_train_steps=4,
        learning_rate=1e-2,
    )


def events(config, kind):
    return [e for e in run_folder.read_history(config.output_dir) if e["event"] == kind]


FORMULAS = {
    "constant": lambda k, w, n: 1.0,
    "constant_with_warmup": lambda k, w, n: min(1, k / w) if w else 1.0,
    "linear": lambda k, w, n: k / w if k < w else (n - k) / (n - w),
    "cosine": lambda k, w, n: k / w if k < w else 0.5 * (1 + math.cos(math.pi * (k - w) / (n - w))),
    "polynomial": lambda k, w, n: k / w if k < w else (1 - 1e-7) * (1 - (k - w) / (n - w)) + 1e-7,
    "cosine_with_restarts": lambda k, w, n: (
        k / w if k < w else 0.5 * (1 + math.cos(math.pi * ((2 * (k - w) / (n - w)) % 1)))
    ),
}


@pytest.mark.parametrize("name", FORMULAS)
@pytest.mark.parametrize("warmup", [0, 3])
def test_learning_rate_is_the_closed_formula(name, warmup):
    config = TrainConfig(lr_scheduler=name, lr_warmup_steps=warmup, lr_num_cycles=2)
    factor = learning_rate_factors(config, 20)
    for k in range(20):
        assert factor(k) == pytest.approx(FORMULAS[name](k, warmup, 20), abs=1e-6)


@pytest.mark.parametrize("accumulation", [1, 3])
def test_recorded_rates_count_optimizer_steps_whatever_the_accumulation(config, accumulation):
    config = config.replace(
        gradient_accumulation_steps=accumulation,
        lr_scheduler="linear",
        lr_warmup_steps=2,
        max_train_steps=6,
    )
    steps = list(train(config))
    expected = [1e-2 * FORMULAS["linear"](k, 2, 6) for k in range(6)]
    assert [s.lr["unet"] for s in steps] == pytest.approx(expected, abs=1e-9)
    assert steps[-1].images_seen == 6 * 2 * accumulation


def test_accumulation_equals_one_larger_batch(config):
    big = train(config.replace(train_batch_size=4, output_dir=config.output_dir + "-big"))
    small = train(config.replace(gradient_accumulation_steps=2))
    for a, b in zip(big, small, strict=True):
        assert a.loss == pytest.approx(b.loss, rel=1e-5)
        assert a.per_image == pytest.approx(b.per_image, rel=1e-4)
        assert a.grad_norm == pytest.approx(b.grad_norm, rel=1e-4)


def test_clipping_sees_every_weight(config, monkeypatch):
    seen = []
    real = torch.nn.utils.clip_grad_norm_

    def spy(parameters, max_norm, **options):
        parameters = list(parameters)
        norm = real(parameters, max_norm, **options)
        after = math.sqrt(sum(p.grad.norm().item() ** 2 for p in parameters))
        seen.append((len(parameters), after))
        return norm

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", spy)
    training = train(config.replace(max_grad_norm=1e-3))
    steps = list(training)
    count = sum(len(weights) for weights in training.weights.values())
    assert count > 0
    assert [n for n, _ in seen] == [count] * 4
    assert all(after <= 1.001e-3 for _, after in seen)
    assert all(s.grad_norm > 1e-3 for s in steps)


def test_each_part_has_its_own_rate(config):
    lora = {"unet": LoraSpec(rank=2), "text_encoder": LoraSpec(rank=2, learning_rate=5e-4)}
    step = next(iter(train(config.replace(lora=lora))))
    assert step.lr == {"unet": 1e-2, "text_encoder": 5e-4}


@pytest.mark.parametrize("part", ["unet", "text_encoder"])
def test_one_part_alone_trains_and_the_other_stays(config, part):
    training = train(config.replace(lora={part: LoraSpec(rank=2)}))
    list(training)
    assert set(adapters.state(training.family)) == {part}
    assert any(
        w.abs().max() > 0 for k, w in adapters.state(training.family)[part].items() if "lora_B" in k
    )


def test_scale_lr_multiplies_by_the_samples_of_a_step(config):
    step = next(iter(train(config.replace(scale_lr=True, gradient_accumulation_steps=3))))
    assert step.lr["unet"] == pytest.approx(1e-2 * 2 * 3)


def test_the_run_folder_is_complete(config):
    list(train(config.replace(checkpointing_steps=2)))
    folder = Path(config.output_dir)
    names = {p.name for p in folder.iterdir()}
    assert names == {
        "config.json", "history.jsonl", "checkpoint-2", "checkpoint-4", "pytorch_lora_weights.safetensors"
    }  # fmt: skip
    assert [e["step"] for e in events(config, "step")] == [1, 2, 3, 4]
    assert [e["step"] for e in events(config, "probe")] == [0, 4]
    assert events(config, "start")[0]["pictures"] == 8
    assert events(config, "end") == [{"event": "end", "step": 4}]


def test_the_first_probe_is_taken_from_the_base_because_nothing_has_changed_yet(config):
    training = train(config)
    training._start_probe(0)
    assert training.probe.measure(0) == training.probe.untrained()  # measured, and exactly equal
    assert training.probe.untrained().difference == 0


def test_the_best_checkpoint_by_the_probe_is_kept(config):
    config = config.replace(
        checkpointing_steps=1, probe_steps=1, checkpoints_total_limit=1, max_train_steps=8
    )
    list(train(config.replace(learning_rate=2.0, seed=2)))
    probes = {e["step"]: e["difference"] for e in events(config, "probe") if e["step"]}
    best = min(probes, key=probes.get)
    kept = {int(p.name.split("-")[1]) for p in checkpoint.found(Path(config.output_dir))}
    assert best != 8
    assert kept == {best, 8}


def test_a_seed_is_drawn_written_down_and_kept(config):
    config = config.replace(seed=None)
    next(iter(train(config)))
    drawn = run_folder.read_config(config.output_dir).seed
    assert isinstance(drawn, int)
    assert train(config).config.seed == drawn


def test_a_finished_run_does_nothing_more(config):
    list(train(config))
    before = (Path(config.output_dir) / "pytorch_lora_weights.safetensors").read_bytes()
    again = train(config)
    assert again.start_step == 4
    assert list(again) == []
    assert not again.interrupted
    assert (Path(config.output_dir) / "pytorch_lora_weights.safetensors").read_bytes() == before


def test_more_steps_go_on_from_the_end(config):
    list(train(config))
    assert [s.step for s in train(config.replace(max_train_steps=6))] == [5, 6]


def test_changed_settings_are_refused_with_both_values(config):
    list(train(config))
    with pytest.raises(CheckpointError, match=r"learning_rate was 0\.01, now 0\.001"):
        train(config.replace(learning_rate=1e-3))
    with pytest.raises(CheckpointError, match=r"lora\.unet\.rank was 2, now 4"):
        train(config.replace(lora={"unet": LoraSpec(rank=4)}))
    with pytest.raises(CheckpointError, match="seed was 3, now 4"):
        train(config.replace(seed=4))
    more = config.replace(learning_rate=1e-3, resume_override=("learning_rate",), max_train_steps=5)
    assert [s.lr["unet"] for s in train(more)] == [1e-3]


def test_overwrite_starts_anew_and_spares_other_files(config):
    list(train(config))
    note = Path(config.output_dir) / "my-notes.txt"
    note.write_text("keep me")
    fresh = train(config.replace(learning_rate=1e-3, overwrite=True, max_train_steps=2))
    assert [s.step for s in fresh] == [1, 2]
    assert note.read_text() == "keep me"
    assert len(events(config, "start")) == 1


def test_changed_pictures_are_refused(config, tmp_path):
    import shutil

    mine = tmp_path / "mine"
    shutil.copytree(config.data.train_data_dir, mine)
    config = config.replace(train_data_dir=str(mine))
    next(iter(train(config)))
    (mine / "train" / "0.png").write_bytes((mine / "train" / "1.png").read_bytes())
    with pytest.raises(CheckpointError, match="pictures or captions"):
        train(config)


def test_a_named_checkpoint_is_continued(config):
    list(train(config.replace(checkpointing_steps=1)))
    for spelling in (
        Path(config.output_dir) / "checkpoint-2",
        "checkpoint-2",
        f"{config.output_dir}/checkpoint-2/",
    ):
        assert train(config.replace(resume_from_checkpoint=str(spelling))).start_step == 2
    with pytest.raises(CheckpointError, match="checkpoint-4"):
        train(config.replace(resume_from_checkpoint="checkpoint-9"))


def test_a_damaged_checkpoint_falls_back_and_repeats_the_same_steps(config):
    config = config.replace(checkpointing_steps=2)
    first = list(train(config))
    (Path(config.output_dir) / "checkpoint-4" / "state.safetensors").write_bytes(b"torn")
    with pytest.warns(UserWarning, match="checkpoint-4"):
        training = train(config)
    assert [s.loss for s in training] == [s.loss for s in first[2:]]


def test_an_exception_in_the_consumer_leaves_a_checkpoint(config):
    def consume():
        for step in train(config):
            if step.step == 3:
                raise RuntimeError("a plot went wrong")

    with pytest.raises(RuntimeError):
        consume()
    assert checkpoint.latest(Path(config.output_dir)).step == 3


def test_an_interrupt_finishes_the_step_and_the_handlers_come_back(config):
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    training = train(config)
    for step in training:
        if step.step == 2:
            os.kill(os.getpid(), signal.SIGINT)
    assert training.interrupted
    assert checkpoint.latest(Path(config.output_dir)).step == 2
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
    assert [s.step for s in train(config)] == [3, 4]


def test_a_second_interrupt_stops_at_once(config):
    def consume():
        for _ in train(config):
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        consume()
    assert checkpoint.latest(Path(config.output_dir)).step == 1


def test_a_killed_process_loses_at_most_one_interval(config):
    file = Path(config.output_dir + ".json")
    file.write_text(config.replace(checkpointing_steps=1, max_train_steps=200).to_json())
    code = (
        "import os, sys\nfrom lora_nb.config import TrainConfig\nfrom lora_nb.trainer import train\n"
        "for s in train(TrainConfig.from_json(open(sys.argv[1]).read())):\n"
        "    if s.step == 3: os.kill(os.getpid(), 9)\n"
    )
    killed = subprocess.run(
        [sys.executable, "-c", code, str(file)], capture_output=True, timeout=120
    )
    assert killed.returncode == -9
    assert checkpoint.latest(Path(config.output_dir)).step == 3
    straight = list(
        train(config.replace(output_dir=config.output_dir + "-straight", max_train_steps=5))
    )
    resumed = list(train(config.replace(max_train_steps=5)))
    assert [s.loss for s in resumed] == [s.loss for s in straight[3:]]


def test_non_finite_losses_stop_before_the_optimizer(config):
    training = train(config)
    steps = iter(training)
    next(steps)
    good = adapters.state(training.family)
    training.family.unet.conv_out.bias.data.fill_(float("nan"))
    with pytest.raises(NumericsError, match="step 2"):
        next(steps)
    assert all(
        torch.equal(good["unet"][k], v) for k, v in adapters.state(training.family)["unet"].items()
    )
    assert checkpoint.latest(Path(config.output_dir)).step == 1


def test_validation_pictures_are_never_trained_on(config):
    training = train(config)
    assert {row.caption for row in training.pictures.rows} == {f"colour {i}" for i in range(8)}
    assert len(training.held_out) == 2


def test_two_runs_in_one_process_may_differ_in_precision(config):
    list(train(config))
    other = config.replace(mixed_precision="bf16", output_dir=config.output_dir + "-bf16")
    assert train(other).family.dtype == torch.bfloat16
    assert (
        train(config.replace(output_dir=config.output_dir + "-again")).family.dtype == torch.float32
    )


def test_the_same_run_twice_gives_the_same_file(config):
    list(train(config))
    list(train(config.replace(output_dir=config.output_dir + "-b")))
    a, b = (checkpoint.latest(Path(config.output_dir + end)).tensors for end in ("", "-b"))
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_lora_dropout_is_named_and_off_outside_the_step(config):
    config = config.replace(lora={"unet": LoraSpec(rank=4, lora_dropout=0.5)})
    straight = list(train(config))
    plain = list(
        train(
            config.replace(lora={"unet": LoraSpec(rank=4)}, output_dir=config.output_dir + "-plain")
        )
    )
    assert straight[-1].loss != plain[-1].loss
    for step in train(config.replace(output_dir=config.output_dir + "-b")):
        torch.rand(5)
        if step.step == 2:
            break
    training = train(config.replace(output_dir=config.output_dir + "-b"))
    assert [s.loss for s in training] == [s.loss for s in straight[2:]]
    assert not any(module.training for module in training.family.unet.modules())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"resolution": 17}, "multiple of"),
        ({"mixed_precision": "fp16"}, "no GPU"),
        ({"pretrained_model_name_or_path": None}, "preset"),
        ({"pretrained_model_name_or_path": "/nowhere"}, "no base model folder"),
        ({"train_data_dir": "/nowhere"}, "/nowhere"),
        ({"lora": {"unet": LoraSpec(target_modules=("to_qq",))}}, "to_qq"),
        ({"lora": {"text_encoder_2": LoraSpec()}}, "text_encoder_2"),
        ({"resume_from_checkpoint": "checkpoint-3"}, "nothing to resume"),
    ],
)
def test_wrong_input_is_refused_before_anything_is_written(config, change, words):
    with pytest.raises((ConfigError, DataError, LoraNbError), match=words):
        train(config.replace(**change))
    assert not Path(config.output_dir).exists()


def test_a_tracker_gets_the_numbers(config):
    list(train(config.replace(report_to="tensorboard")))
    assert list(Path(config.output_dir).rglob("events.out.tfevents*"))


@pytest.mark.slow
def test_two_processes_equal_one(config, tmp_path):
    """Two gloo processes of batch 1 give the losses of one process of batch 2, at the same learning rates."""
    config = config.replace(
        train_batch_size=1, lr_scheduler="linear", lr_warmup_steps=2, gradient_accumulation_steps=2
    )
    file = tmp_path / "config.json"
    file.write_text(config.to_json())
    code = tmp_path / "go.py"
    code.write_text(
        "import sys\nfrom lora_nb.config import TrainConfig\nfrom lora_nb.trainer import train\n"
        "for _ in train(TrainConfig.from_json(open(sys.argv[1]).read())): pass\n"
    )
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node",
        "2",
        "--master_port",
        "29517",
    ]
    env = os.environ | {"ACCELERATE_USE_CPU": "1"}
    done = subprocess.run(
        [*launch, str(code), str(file)], capture_output=True, text=True, timeout=300, env=env
    )
    assert done.returncode == 0, done.stderr[-2000:]
    two = events(config, "step")
    one = list(train(config.replace(train_batch_size=2, output_dir=config.output_dir + "-one")))
    assert [e["loss"] for e in two] == pytest.approx([s.loss for s in one], rel=1e-4)
    assert [e["lr"] for e in two] == [s.lr for s in one]
    assert json.dumps(two[-1]["images_seen"]) == str(one[-1].images_seen)


def test_no_warning_of_our_own_is_hidden(config):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        list(train(config))
    assert trainer.Step.__doc__
