"""The loop: schedules, accumulation, clipping, stopping, refusing; each against a formula or an uninterrupted run."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import warnings
import weakref
from pathlib import Path

import pytest
import safetensors.torch
import torch

from lora_nb import adapters, checkpoint, data, run_folder, trainer
from lora_nb.config import LoraSpec, TrainConfig
from lora_nb.errors import CheckpointError, ConfigError, DataError, LoraNbError, NumericsError
from lora_nb.optimization import learning_rate_factors
from lora_nb.trainer import train


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
    real = torch.nn.utils.clip_grads_with_norm_

    def spy(parameters, max_norm, total):
        parameters = list(parameters)
        real(parameters, max_norm, total)
        after = math.sqrt(sum(p.grad.norm().item() ** 2 for p in parameters))
        seen.append((len(parameters), after))

    monkeypatch.setattr(torch.nn.utils, "clip_grads_with_norm_", spy)
    training = train(config.replace(max_grad_norm=1e-3))
    steps = list(training)
    count = sum(len(weights) for weights in training.learner.weights.values())
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
    assert [e["step"] for e in events(config, "end")] == [4]


def test_the_first_probe_is_taken_from_the_base_because_nothing_has_changed_yet(config):
    training = train(config)
    training.monitor.start(0, training.held_out, training.cache)
    probe = training.monitor.probe
    assert probe.measure(0) == probe.untrained()  # measured, and exactly equal
    assert probe.untrained().difference == 0


def test_the_best_checkpoint_by_the_probe_is_kept(config):
    config = config.replace(
        checkpointing_steps=1, probe_steps=1, checkpoints_total_limit=1, max_train_steps=8
    )
    training = train(config.replace(learning_rate=0.02))
    for step in training:
        if step.step == 4:  # from here it climbs its own loss, so the best cannot be the last
            for group in training.learner.optimizer.param_groups:
                group["maximize"] = True
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


def test_a_run_that_was_moved_goes_on_where_it_lies_now(config, tmp_path):
    next(iter(train(config)))
    moved = Path(config.output_dir).rename(tmp_path / "moved")
    assert [step.step for step in train(run_folder.read_config(moved))] == [2, 3, 4]
    assert not Path(config.output_dir).exists()


def test_a_finished_run_does_nothing_more(config):
    list(train(config))
    before = (Path(config.output_dir) / "pytorch_lora_weights.safetensors").read_bytes()
    with pytest.warns(UserWarning, match="already finished at step 4 of 4: raise max_train_steps"):
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


def test_what_is_half_way_when_python_ends_is_saved(config):
    """Where a name still has the loop, and where only a knot of references has."""
    runs = [config.replace(output_dir=f"{config.output_dir}-{name}") for name in ("name", "knot")]
    files = [run.output_dir + ".json" for run in runs]
    for run, file in zip(runs, files, strict=True):
        Path(file).write_text(run.to_json())
    code = (
        "import sys\nfrom lora_nb.config import TrainConfig\nfrom lora_nb.trainer import train\n"
        "def half(file):\n"
        "    steps = iter(train(TrainConfig.from_json(open(file).read())))\n"
        "    return next(steps), next(steps), steps\n"
        "kept, knot = half(sys.argv[1]), [half(sys.argv[2])]\n"
        "knot.append(knot)\ndel knot\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *files], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0
    assert "Traceback" not in done.stderr, done.stderr
    assert [checkpoint.latest(Path(run.output_dir)).step for run in runs] == [2, 2]
    assert [s.step for s in train(runs[1])] == [3, 4]


def test_a_loop_that_cannot_be_saved_when_python_ends_does_not_keep_others_from_it(config):
    first, kept, last = (config.replace(output_dir=f"{config.output_dir}-{i}") for i in range(3))
    loops = [iter(train(run)) for run in (first, kept, last)]
    for steps in loops:
        next(steps)
    for gone in (first, last):
        shutil.rmtree(gone.output_dir)
    with pytest.raises(CheckpointError, match="no longer this training's"):
        trainer._finish_all()
    assert checkpoint.latest(Path(kept.output_dir)).step == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a CUDA GPU")
def test_8_bit_moments_are_refused_where_there_is_no_gpu(config):
    with pytest.raises(ConfigError, match="use_8bit_adam needs a CUDA GPU"):
        train(config.replace(use_8bit_adam=True))


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


def finite(folder):
    """Whether every number in every file of a run is finite."""
    tensors = [t for p in checkpoint.found(folder) for t in checkpoint.read(p).tensors.values()]
    if (adapter := folder / "pytorch_lora_weights.safetensors").is_file():
        tensors += safetensors.torch.load_file(adapter).values()
    return all(torch.isfinite(t).all() for t in tensors)


def test_a_learning_rate_beyond_all_bounds_is_noticed_in_its_own_step_and_not_kept(config):
    steps = iter(train(config.replace(learning_rate=1e30, checkpointing_steps=1)))
    with pytest.raises(
        NumericsError, match=r"After step 1 the norm .* last checkpoint is of step 0"
    ):
        next(steps)
    assert checkpoint.found(Path(config.output_dir)) == []
    assert not (Path(config.output_dir) / "pytorch_lora_weights.safetensors").exists()


def test_one_poisoned_picture_is_named_and_its_steps_are_not_taken(config):
    training = train(config.replace(train_batch_size=1, max_train_steps=8, checkpointing_steps=1))
    make = training.cache.batch

    def poisoned(positions):
        batch = make(positions)
        if positions == [3]:
            batch.moments[0].fill_(float("nan"))
        return batch

    training.cache.batch = poisoned
    row = data.row_at(3, 8, 3)
    name = training.pictures.rows[row].name
    with pytest.raises(NumericsError, match=f"step 4 is nan .*{name}.*learning rate"):
        list(training)
    assert checkpoint.latest(Path(config.output_dir)).step == 3
    assert finite(Path(config.output_dir))


def test_moments_that_are_not_finite_are_not_saved(config):
    training = train(config.replace(checkpointing_steps=1))
    steps = iter(training)
    next(steps)
    next(iter(training.learner.optimizer.state.values()))["exp_avg_sq"].fill_(float("inf"))
    with pytest.raises(NumericsError, match=r"exp_avg_sq is not finite after step 2"):
        next(steps)
    assert [checkpoint.step_of(p) for p in checkpoint.found(Path(config.output_dir))] == [1]
    assert finite(Path(config.output_dir))


@pytest.mark.parametrize("asked", ["setting", "environment"])
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_trainable_weights_are_float32_however_precision_is_asked_for(
    config, monkeypatch, precision, asked
):
    if asked == "setting":
        config = config.replace(mixed_precision=precision)
    else:
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", precision)
    next(iter(train(config)))
    resumed = train(config)
    weights = [w for part in resumed.learner.weights.values() for w in part]
    base = {w.dtype for w in resumed.family.unet.parameters() if not w.requires_grad}
    assert {w.dtype for w in weights} == {torch.float32}
    assert base == {torch.bfloat16 if precision == "bf16" else torch.float32}
    assert resumed.start_step == 1


def test_fp16_without_a_gpu_is_refused_also_from_the_environment(config, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    with pytest.raises(ConfigError, match="no GPU"):
        train(config)


def test_a_run_that_changed_nothing_is_an_error_with_its_reason(config):
    idle = config.replace(
        lr_scheduler="constant_with_warmup", lr_warmup_steps=10, max_train_steps=1
    )
    for _ in range(2):  # running it again does not hide it
        with pytest.raises(
            NumericsError, match=r"B is zero in every layer.*rate was 0.*warmup_steps 10"
        ):
            list(train(idle))
    assert not (Path(config.output_dir) / "pytorch_lora_weights.safetensors").exists()


def test_the_step_says_whether_the_adapters_live(config):
    lora = {"unet": LoraSpec(rank=2), "text_encoder": LoraSpec(rank=2)}
    training = train(config.replace(lora=lora, max_train_steps=51))
    training.rates.peaks["text_encoder"] = 0.0  # its optimizer group never moves
    with pytest.warns(
        UserWarning, match="After 50 steps B is still zero in every layer of text_enc"
    ):
        steps = list(training)
    assert [s.step for s in steps if s.health] == [1, 25, 50, 51]
    assert steps[49].health.zero_b == {"unet": 0.0, "text_encoder": 1.0}
    assert steps[49].health.moved["unet"] > 0.99
    assert steps[49].health.moved["text_encoder"] == 0
    for step in steps:
        assert step.grad_norms.keys() == lora.keys()
        assert step.grad_norm == pytest.approx(math.hypot(*step.grad_norms.values()))
    assert [e["step"] for e in events(config, "step") if "health" in e] == [1, 25, 50, 51]
    assert [e["step"] for e in events(config, "alarm")] == [50]


def memory_for(training, pictures, where):
    """Let memory end beyond so many pictures, in the network's forward or, with all gradients there, in backward."""
    failed = []

    def check(module, values, *rest):
        if len(values[0]) > pictures:
            held = torch.zeros(1000)
            failed.append((weakref.ref(held), len(values[0])))
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 MiB")

    layer = training.family.unet.conv_in
    if where == "forward":
        layer.register_forward_pre_hook(check)
    else:
        layer.register_full_backward_pre_hook(lambda module, grad: check(module, grad))
        hold = layer.register_forward_pre_hook(lambda module, x: x[0].requires_grad_())
        assert hold
    return failed


@pytest.mark.parametrize(("where", "fits"), [("forward", 3), ("forward", 1), ("backward", 2)])
def test_out_of_memory_halves_the_micro_batch_with_the_same_result(config, where, fits):
    config = config.replace(
        train_batch_size=5, gradient_accumulation_steps=2, random_flip=True, probe_size=1
    )
    plenty = list(train(config.replace(output_dir=config.output_dir + "-plenty")))
    training = train(config)
    failed = memory_for(training, fits, where)
    with pytest.warns(
        UserWarning, match=rf"ran out in step 1: from now on {fits} pictures at a time"
    ):
        tight = list(training)
    assert {1: [2, 2, 2, 5, 3, 2], 2: [5, 3], 3: [5]}[fits] == [size for _, size in failed]
    # With room for one only, the batches of the probe (two draws) were halved first.
    assert all(held() is None for held, _ in failed)  # what a failed attempt held is free
    for a, b in zip(plenty, tight, strict=True):
        assert a.timesteps == b.timesteps
        assert a.loss == pytest.approx(b.loss, rel=1e-4)
        assert a.per_image == pytest.approx(b.per_image, rel=1e-3)
        assert a.grad_norm == pytest.approx(b.grad_norm, rel=1e-3)
    assert [e["micro_batch"] for e in events(config, "memory")] == [fits]
    saved = checkpoint.latest(Path(config.output_dir))
    assert saved.meta["micro_batch"] == fits


def test_a_run_short_of_memory_goes_on_exactly(config):
    config = config.replace(train_batch_size=4, probe_size=1)
    results = []
    for name, stop in (("whole", None), ("parts", 2), ("parts", None)):
        training = train(config.replace(output_dir=f"{config.output_dir}-{name}"))
        if training.start_step == 0:
            memory_for(training, 2, "forward")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for step in training:
                results.append((step.step, step.loss))
                if step.step == stop:
                    break
    assert results[4:] == results[:4]


def test_a_single_picture_too_large_is_one_sentence(config):
    training = train(config)
    training.monitor.start(0, training.held_out, training.cache)
    memory_for(training, 0, "forward")
    with pytest.raises(
        ConfigError, match=r"A single picture does not fit into memory .*resolution"
    ):
        list(training)


def test_other_errors_are_not_taken_for_a_lack_of_memory(config):
    training = train(config)
    training.monitor.start(0, training.held_out, training.cache)
    training.family.unet.conv_in.register_forward_pre_hook(lambda m, x: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        list(training)


def test_an_accumulation_window_is_always_full_and_crosses_epochs(config):
    """8 pictures, batch 1, accumulation 3: no remainder is left, so none is divided by the wrong number."""
    training = train(
        config.replace(train_batch_size=1, gradient_accumulation_steps=3, max_train_steps=8)
    )
    seen, make = [], training.cache.batch
    training.cache.batch = lambda positions: seen.extend(positions) or make(positions)
    steps = list(training)
    assert seen == list(range(24))
    rows = [data.row_at(p, 8, 3) for p in seen]
    assert all(sorted(rows[k : k + 8]) == list(range(8)) for k in (0, 8, 16))
    for step in steps:
        assert len(step.per_image) == 3
        assert step.loss == pytest.approx(sum(step.per_image) / 3, rel=1e-6)
    assert training.steps_per_epoch == 3


def test_the_last_step_is_saved_whatever_the_interval(config):
    list(train(config.replace(max_train_steps=10, checkpointing_steps=4, probe_size=1)))
    steps = [checkpoint.step_of(p) for p in checkpoint.found(Path(config.output_dir))]
    assert steps == [10, 8, 4]


def test_going_back_to_an_older_checkpoint_leaves_the_other_way(config):
    """Otherwise the next resume would take the newest checkpoint of a way that was left."""
    list(train(config.replace(checkpointing_steps=1)))
    back = config.replace(
        resume_from_checkpoint="checkpoint-2",
        learning_rate=1e-3,
        resume_override=("learning_rate",),
    )
    for step in train(back):
        assert step.step == 3
        break
    steps = [checkpoint.step_of(p) for p in checkpoint.found(Path(config.output_dir))]
    assert steps == [3, 2, 1]
    assert train(back.replace(resume_from_checkpoint=None)).start_step == 3


def test_a_checkpoint_elsewhere_begins_a_new_folder_and_no_other_is_taken_for_it(config):
    list(train(config.replace(checkpointing_steps=2)))
    elsewhere = config.replace(output_dir=config.output_dir + "-b")
    from_two = elsewhere.replace(resume_from_checkpoint=f"{config.output_dir}/checkpoint-2/")
    assert [s.step for s in train(from_two)] == [3, 4]
    wrong = config.replace(resume_from_checkpoint="/nowhere/checkpoint-2")
    with pytest.raises(
        CheckpointError, match=r"no complete checkpoint at /nowhere.*checkpoint-4, check"
    ):
        train(wrong)
    third = config.replace(output_dir=config.output_dir + "-c", resume_from_checkpoint=None)
    list(train(third))
    with pytest.raises(CheckpointError, match="belongs to another run"):
        train(third.replace(resume_from_checkpoint=f"{config.output_dir}/checkpoint-2"))


def test_another_base_model_under_the_same_name_is_refused(config, tmp_path, tiny_sd):
    import shutil

    base = tmp_path / "base"
    shutil.copytree(tiny_sd, base)
    config = config.replace(pretrained_model_name_or_path=str(base))
    next(iter(train(config)))
    file = base / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = safetensors.torch.load_file(file)
    safetensors.torch.save_file({k: v + 0.1 for k, v in tensors.items()}, file, {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"weights of the base model.*base was \w+, now \w+"):
        train(config)
    assert train(config.replace(resume_override=("base",))).start_step == 1


def test_a_second_loop_over_the_same_training_goes_on(config):
    straight = [s.loss for s in train(config.replace(output_dir=config.output_dir + "-a"))]
    training, losses = train(config), []
    for stop in (1, 3, 9):
        for step in training:
            losses.append(step.loss)
            if step.step == stop:
                break
    assert losses == straight
    assert not training.interrupted


def test_a_second_interrupt_after_the_optimizer_step_does_not_mix_two_steps(config, monkeypatch):
    """Whenever the loop dies, weights and step number in the checkpoint belong together."""
    straight = list(train(config.replace(output_dir=config.output_dir + "-a")))
    training = train(config)
    steps = iter(training)
    next(steps)

    def dies(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(training, "_record_of", dies)
    with pytest.raises(KeyboardInterrupt):
        next(steps)
    assert checkpoint.latest(Path(config.output_dir)).step == 2
    assert [s.loss for s in train(config)] == [s.loss for s in straight[2:]]


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
