"""The step on buffers is the eager step, and a graph of it too; the tests of graphs need a CUDA GPU."""

import functools
import math
import warnings

import pytest
import torch
from accelerate.optimizer import AcceleratedOptimizer

from lora_nb import adapters, checkpoint
from lora_nb.config import LoraSpec
from lora_nb.errors import NumericsError
from lora_nb.families import tiny
from lora_nb.graphed import GraphedStep, require_same
from lora_nb.trainer import train

gpu = pytest.mark.gpu


def uncaptured():
    """What makes no graph of a step: it runs it with the weights held, as a capture does, and then as it is."""

    def capture(run, hold):
        hold.fill_(1.0)
        run(), run()
        hold.fill_(0.0)
        return run

    return capture


def on_buffers(config):
    """A training whose steps are run on buffers, on any device."""
    training = train(config)
    training.graphed = GraphedStep(
        training.config, training.learner, training.batches, training.gradients, uncaptured
    )
    return training


def after(training):
    """The records of all its steps, and the weights at the end."""
    return list(training), adapters.state(training.family)


def check_equal(a, b, tolerance):
    """Two trainings, as `after` gives them, to a tolerance relative to the numbers' size."""
    (steps_a, state_a), (steps_b, state_b) = a, b
    for x, y in zip(steps_a, steps_b, strict=True):
        assert x.loss == pytest.approx(y.loss, rel=tolerance)
        assert x.per_image == pytest.approx(y.per_image, rel=tolerance)
        assert x.grad_norms == pytest.approx(y.grad_norms, rel=10 * tolerance)
        assert (x.lr, x.timesteps, x.images_seen) == (y.lr, y.timesteps, y.images_seen)
    for part, weights in state_a.items():
        for key, value in weights.items():
            torch.testing.assert_close(value, state_b[part][key], rtol=tolerance, atol=tolerance)


def check_alike(a, b, tolerance):
    """The same on a GPU, where a gradient next to zero may turn its sign: the weights by their difference's norm."""
    (steps_a, state_a), (steps_b, state_b) = a, b
    for x, y in zip(steps_a, steps_b, strict=True):
        assert x.loss == pytest.approx(y.loss, rel=tolerance)
        assert x.grad_norm == pytest.approx(y.grad_norm, rel=100 * tolerance)
        assert (x.lr, x.timesteps, x.images_seen) == (y.lr, y.timesteps, y.images_seen)
    for part, weights in state_a.items():
        both = [torch.cat([w.flatten() for w in s[part].values()]) for s in (state_a, state_b)]
        assert weights
        assert (both[0] - both[1]).norm() <= 100 * tolerance * both[1].norm()


@pytest.fixture
def exact(monkeypatch):
    """Convolutions in full float32, by the same kernels in both steps."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)


@pytest.fixture(scope="session")
def tiny_sdxl(tmp_path_factory):
    """A base model of two text encoders, sizes and crops."""
    return tiny.build("sdxl", tmp_path_factory.mktemp("tiny-sdxl"))


@pytest.fixture
def class_folder(tmp_path):
    from PIL import Image

    folder = tmp_path / "class"
    folder.mkdir()
    for i in range(4):
        Image.new("RGB", (16, 16), (10, 60 * i, 30)).save(folder / f"{i}.png")
    return folder


CHANGES = {
    "plain": {},
    "accumulation": {"gradient_accumulation_steps": 2},
    "noise offset, min-SNR, warm-up": {
        "noise_offset": 0.1, "snr_gamma": 5.0, "lr_scheduler": "linear", "lr_warmup_steps": 3,
    },
    "no clipping": {"max_grad_norm": 0.0},
    "checkpointing": {"gradient_checkpointing": True},
    "int8": {"base_model_precision": "int8"},
    "buckets": {"bucket_step": 8, "random_crops": 2},
}  # fmt: skip


@pytest.mark.parametrize("changes", CHANGES.values(), ids=CHANGES)
def test_the_step_on_buffers_is_the_eager_step(config, changes):
    config = config.replace(max_train_steps=10, learning_rate=1e-3, **changes)
    eager = after(train(config))
    buffered = after(on_buffers(config.replace(output_dir=config.output_dir + "-2")))
    check_equal(eager, buffered, 1e-6)


def test_the_step_on_buffers_with_prior_preservation(config, class_folder):
    config = config.replace(
        with_prior_preservation=True, class_data_dir=str(class_folder), class_prompt="a thing",
        num_class_images=4, prior_loss_weight=0.5, max_train_steps=6,
    )  # fmt: skip
    eager = after(train(config))
    buffered = after(on_buffers(config.replace(output_dir=config.output_dir + "-2")))
    check_equal(eager, buffered, 1e-6)


def test_the_step_on_buffers_of_another_family(config, tiny_sdxl):
    config = config.replace(pretrained_model_name_or_path=str(tiny_sdxl), max_train_steps=10)
    eager = after(train(config))
    buffered = after(on_buffers(config.replace(output_dir=config.output_dir + "-2")))
    check_equal(eager, buffered, 1e-6)


def scaled(training, scale):
    """A training with a loss scaler that begins at this scale, on any device."""
    scaler = torch.amp.GradScaler(training.family.device.type, init_scale=scale, growth_interval=3)
    training.accelerator.scaler = scaler
    learner = training.learner
    learner.optimizer = AcceleratedOptimizer(learner.optimizer.optimizer, False, scaler)
    # As accelerate does where its precision is fp16, which it refuses on a CPU.
    unscale = functools.partial(scaler.unscale_, learner.optimizer.optimizer)
    training.accelerator.unscale_gradients = unscale
    return training


@pytest.mark.parametrize("scale", [8.0, 2.0**127], ids=["small", "too large at first"])
def test_the_step_on_buffers_with_a_loss_scaler(config, scale):
    """Where gradients overflow, both skip the step and go on with a smaller scale; then both raise it again."""
    lora = {"unet": LoraSpec(rank=4, lora_alpha=4e3)}  # gradients that are large enough to overflow
    config = config.replace(lora=lora, max_train_steps=12, learning_rate=1e-6)
    eager = scaled(train(config), scale)
    records = after(eager)
    buffered = scaled(train(config.replace(output_dir=config.output_dir + "-2")), scale)
    buffered.graphed = GraphedStep(
        buffered.config, buffered.learner, buffered.batches, buffered.gradients, uncaptured
    )
    check_equal(records, after(buffered), 1e-6)
    states = [t.accelerator.scaler.state_dict() for t in (eager, buffered)]
    assert states[0] == states[1]
    skipped = [step.step for step in records[0] if not math.isfinite(step.grad_norm)]
    assert bool(skipped) == (scale > 8)
    assert 12 not in skipped
    assert states[0]["scale"] != scale


def poison(training, name):
    """Make the named input of the next step not a number."""
    micros = training.graphed._micros(training.done)
    micros[0].inputs[name].fill_(float("nan"))


def check_refused(training):
    """A step whose numbers are not finite is refused, and leaves everything as it was."""
    steps = iter(training)
    next(steps)
    before = adapters.state(training.family)
    poison(training, "target")
    with pytest.raises(NumericsError, match=r"loss of step 2 is nan \(pictures: .*png"):
        next(steps)
    for key, value in adapters.state(training.family)["unet"].items():
        assert torch.equal(value, before["unet"][key])
    states = training.learner.optimizer.state.values()
    assert {float(state["step"]) for state in states} == {1.0}
    assert all(torch.isfinite(state["exp_avg"]).all() for state in states)
    assert training.saved_step == 1  # whole, so it was saved as the loop ended


def test_what_is_not_finite_leaves_the_weights_alone(config):
    check_refused(on_buffers(config))


def test_eager_and_buffered_steps_go_on_from_each_other(config):
    config = config.replace(max_train_steps=6)
    whole = after(train(config.replace(output_dir=config.output_dir + "-whole")))
    for make, stop in ((on_buffers, 2), (train, 4), (on_buffers, 6)):
        training = make(config)
        for step in training:
            if step.step == stop:
                break
    assert not training.interrupted
    check_equal(([], whole[1]), ([], adapters.state(training.family)), 1e-6)


def test_a_cpu_has_no_graphs(config):
    assert train(config).graphed is None or torch.cuda.is_available()


def test_weights_that_have_moved_are_captured_anew(config):
    training = on_buffers(config)
    steps = iter(training)
    next(steps)
    first = training.graphed.graphs
    next(steps)
    assert training.graphed.graphs is first
    weight = training.family.unet.conv_in.weight
    weight.data = weight.data.clone()
    next(steps)
    assert training.graphed.graphs is not first
    steps.close()


def test_a_capture_that_fails_leaves_the_eager_step_and_says_why(config):
    def broken():
        def capture(run, hold):
            hold.fill_(1.0)
            run()
            raise RuntimeError("operation not permitted\nwhen capturing")

        return capture

    whole = after(train(config))
    training = train(config.replace(output_dir=config.output_dir + "-2"))
    training.graphed = GraphedStep(
        training.config, training.learner, training.batches, training.gradients, broken
    )
    with pytest.warns(UserWarning, match="RuntimeError: operation not permitted"):
        fallen = after(training)
    check_equal(whole, fallen, 0.0)


def test_a_graph_that_does_not_fit_is_tried_again_with_fewer_pictures(config):
    captured = []

    def small():
        def capture(run, hold):
            if training.gradients.micro_batch == 2:
                raise torch.OutOfMemoryError("CUDA out of memory")
            captured.append(training.gradients.micro_batch)
            return run

        return capture

    whole = after(train(config))
    training = train(config.replace(output_dir=config.output_dir + "-2"))
    training.graphed = GraphedStep(
        training.config, training.learner, training.batches, training.gradients, small
    )
    steps = iter(training)
    with pytest.warns(UserWarning, match="could not be captured"):
        first = next(steps)
    second = next(steps)  # eager, without trying again
    training.gradients.micro_batch = 1  # as the eager step would once memory ran out
    rest = list(steps)
    assert captured == [1]
    check_equal(whole, ([first, second, *rest], adapters.state(training.family)), 1e-5)


# on a GPU


def graphed(config):
    """A training by graphs that were really captured; a warning of a failure is an error here."""
    training = train(config)
    assert training.graphed is not None
    return training


def both(config, **changes):
    """The same training by eager steps, and by graphs with the changes."""
    eager = after(train(config.replace(cuda_graph=False)))
    training = graphed(config.replace(output_dir=config.output_dir + "-2", **changes))
    found = after(training)
    assert training.graphed.reason == ""
    assert training.graphed.captured
    assert not training.graphed.graphs  # their memory is free for what comes next
    return eager, found


def test_a_replay_that_finds_something_else_is_refused():
    eager = torch.tensor([0.5, 0.25, math.nan, 3.0])
    require_same(eager * 1.01, eager)
    with pytest.raises(RuntimeError, match=r"differs from the eager step by 1\.0e-01"):
        require_same(torch.tensor([0.5, 0.25, math.nan, 3.3]), eager)


@gpu
@pytest.mark.parametrize("changes", CHANGES.values(), ids=CHANGES)
def test_a_graph_is_the_eager_step(exact, config, changes):
    config = config.replace(max_train_steps=20, learning_rate=1e-3, **changes)
    check_alike(*both(config), 1e-5)


@gpu
def test_a_graph_of_another_family_is_the_eager_step(exact, config, tiny_sdxl):
    config = config.replace(pretrained_model_name_or_path=str(tiny_sdxl), learning_rate=1e-3)
    check_alike(*both(config.replace(max_train_steps=20)), 1e-5)


@gpu
@pytest.mark.parametrize(
    "changes",
    [{"channels_last": False}, {}, {"torch_compile": True}],
    ids=["contiguous", "channels_last", "compiled"],
)
def test_a_graph_in_bf16_has_the_eager_losses(exact, config, changes):
    config = config.replace(mixed_precision="bf16", learning_rate=1e-3, max_train_steps=20)
    (eager, _), (found, _) = both(config, **changes)
    for a, b in zip(eager, found, strict=True):
        assert a.loss == pytest.approx(b.loss, abs=2e-3)


@gpu
def test_a_graph_leaves_the_weights_alone_where_numbers_are_not_finite(config):
    check_refused(graphed(config))


@gpu
def test_a_graph_goes_on_from_a_checkpoint(exact, config):
    config = config.replace(max_train_steps=6)
    whole = after(graphed(config.replace(output_dir=config.output_dir + "-whole")))
    for make, stop in (
        (graphed, 2),
        (lambda c: train(c.replace(cuda_graph=False)), 4),
        (graphed, 6),
    ):
        training = make(config)
        for step in training:
            if step.step == stop:
                break
    check_alike(([], whole[1]), ([], adapters.state(training.family)), 1e-5)


@gpu
def test_the_host_waits_once_in_a_step(config):
    training = graphed(config.replace(max_train_steps=30))
    steps = iter(training)
    for _ in range(12):  # health is looked at in the first and tenth, and all pictures are encoded
        next(steps)
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            next(steps)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    waits = [str(each.message) for each in caught if "synchroniz" in str(each.message)]
    assert len(waits) <= 1, waits
    steps.close()


@gpu
def test_sampling_between_steps_does_not_disturb_a_graph(exact, config):
    config = config.replace(max_train_steps=6)
    calm = after(graphed(config))
    training = graphed(config.replace(output_dir=config.output_dir + "-2"))
    steps = []
    for step in training:
        steps.append(step)
        pipeline = training.family.pipeline()
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            pipeline("a", num_inference_steps=1, height=16, width=16, generator=generator)
    check_alike(calm, (steps, adapters.state(training.family)), 1e-5)
    assert math.isfinite(steps[-1].loss)


@gpu
def test_a_graph_in_fp16_has_the_eager_losses_and_scale(exact, config):
    config = config.replace(mixed_precision="fp16", learning_rate=1e-3, max_train_steps=20)
    eager = train(config.replace(cuda_graph=False))
    losses = [step.loss for step in eager]
    training = graphed(config.replace(output_dir=config.output_dir + "-2"))
    assert [step.loss for step in training] == pytest.approx(losses, abs=2e-3)
    assert training.graphed.captured
    states = [t.accelerator.scaler.state_dict() for t in (eager, training)]
    assert states[0] == states[1]


@gpu
@pytest.mark.parametrize("asked", ["fp16", "bf16"])
def test_half_precision_on_a_gpu_keeps_float32_adapters_and_finite_files(config, asked):
    """fp16 with its loss scaler: nothing to unscale is in half precision, and what is saved is finite and resumes."""
    config = config.replace(mixed_precision=asked, max_train_steps=20)
    training = train(config)
    for step in training:
        if step.step == 10:
            break
    again = train(config)
    assert {w.dtype for part in again.learner.weights.values() for w in part} == {torch.float32}
    assert [step.step for step in again] == list(range(11, 21))
    assert all(
        torch.isfinite(value).all() for value in checkpoint.latest(training.folder).tensors.values()
    )
