"""What can befall a run: kill -9, full and failing disks, flipped bits, a second process, a notebook's stop button."""

import copy
import errno
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path

import nbformat
import pytest
import torch
from lives import At, Lives, die, log_of, watched
from nbclient import NotebookClient
from safetensors.torch import load_file
from test_checkpoint import TENSORS, save

from lora_nb import checkpoint, env, files, lock, precision, run_folder
from lora_nb.errors import CheckpointError, ConfigError
from lora_nb.families import load_family
from lora_nb.inference import with_samples
from lora_nb.trainer import train


@pytest.fixture
def config(config):
    return config.replace(probe_size=2)


@pytest.fixture(scope="module")
def lives(tmp_path_factory):
    with Lives(tmp_path_factory.mktemp("lives")) as lives:
        yield lives


# one save


def save_and_prune(run: Path) -> None:
    """What the trainer does at step 6: two older checkpoints, of which one has to go."""
    save(run, 6, 3.0)
    checkpoint.prune(run, 2, keep=set())


def run_at_step_4(folder: Path) -> Path:
    for step in (2, 4):
        save(folder, step, step / 2)
    return folder


def operations_of_a_save(folder: Path) -> list[str]:
    count = At(None)
    with watched(folder, count):
        save_and_prune(folder)
    return count.names


def whole(run: Path) -> checkpoint.Checkpoint:
    """The newest checkpoint, whose numbers must be those that were saved at its step; nothing may warn."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        newest = checkpoint.latest(run)
    for name, value in TENSORS.items():
        assert torch.equal(newest.tensors[name], value * newest.step / 2)
    return newest


def killed_while_saving(run: Path, k: int) -> None:
    """A process that dies at the k-th file operation of a save."""
    child = os.fork()
    if child == 0:
        with watched(run, At(k, die)):
            save_and_prune(run)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


def test_kill_9_at_every_file_operation_of_a_save(tmp_path):
    names = operations_of_a_save(run_at_step_4(tmp_path / "count"))
    assert len(names) >= 25
    newest = []
    for k in range(1, len(names) + 1):
        run = run_at_step_4(tmp_path / str(k))
        killed_while_saving(run, k)
        newest.append(whole(run).step)
        checkpoint.sweep(run)
        save_and_prune(run)  # life goes on
        assert sorted(p.name for p in run.iterdir()) == ["checkpoint-4", "checkpoint-6"]
    assert newest == sorted(newest)  # before the rename the old one, from it on the new one
    assert set(newest) == {4, 6}


@pytest.mark.parametrize("lasts", [False, True], ids=["once", "from then on"])
@pytest.mark.parametrize(
    "number", [errno.ENOSPC, errno.EIO, errno.EACCES, errno.EXDEV, errno.EROFS]
)
def test_errors_at_every_file_operation_of_a_save(tmp_path, number, lasts):
    def fail():
        raise OSError(number, os.strerror(number))

    refused = 0
    for k in range(1, len(operations_of_a_save(run_at_step_4(tmp_path / "count"))) + 1):
        run = run_at_step_4(tmp_path / str(k))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # an old one that cannot be deleted is a warning
            said = message_of(run, At(k, fail, lasts))
        refused += bool(said)
        assert not said or all(
            word in said for word in (os.strerror(number), " MB and ", " MB are free")
        )
        for step in (4,) if (run / "checkpoint-6").exists() else (2, 4):
            checkpoint.verify(run / f"checkpoint-{step}")
        whole(run)
        checkpoint.sweep(run)
        assert {p.name for p in run.iterdir()} <= {"checkpoint-2", "checkpoint-4", "checkpoint-6"}
        shutil.rmtree(run)
    assert refused >= 15


def message_of(run: Path, hook: At) -> str:
    """What a save says that fails; empty if it does not fail."""
    try:
        with watched(run, hook):
            save_and_prune(run)
    except CheckpointError as error:
        return str(error)
    return ""


def moved_like_drive(source: Path | str, target: Path | str, backwards: bool) -> None:
    """A rename as a mounted drive makes it: every file is copied, in its own order, then the old ones are deleted."""
    os.mkdir(target)
    names = sorted(os.listdir(source), reverse=backwards)
    for name in names:
        with open(Path(target) / name, "wb") as file:
            file.write((Path(source) / name).read_bytes())
    for name in names:
        os.unlink(Path(source) / name)
    os.rmdir(source)


@pytest.mark.parametrize("backwards", [False, True], ids=["manifest first", "manifest last"])
def test_kill_9_where_a_rename_is_no_stroke_as_on_a_mounted_drive(tmp_path, monkeypatch, backwards):
    """Killed at every operation: only a checkpoint that verifies is gone on from."""
    monkeypatch.setattr(os, "rename", lambda a, b: moved_like_drive(a, b, backwards))
    names = operations_of_a_save(run_at_step_4(tmp_path / "count"))
    assert len(names) >= 40
    for k in range(1, len(names) + 1):
        run = run_at_step_4(tmp_path / str(k))
        killed_while_saving(run, k)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a half that has a manifest is named
            newest = checkpoint.latest(run)
        assert newest.step in (4, 6)
        for name, value in TENSORS.items():
            assert torch.equal(newest.tensors[name], value * newest.step / 2)
        checkpoint.sweep(run)
        save_and_prune(run)
        assert whole(run).step == 6


def test_60_truncations_are_passed_over(tmp_path):
    run = run_at_step_4(tmp_path)
    numbers = random.Random(0)
    for name in (checkpoint.STATE, checkpoint.META, checkpoint.MANIFEST):
        file = run / "checkpoint-4" / name
        content = file.read_bytes()
        for length in [0, len(content) - 1, *(numbers.randrange(len(content)) for _ in range(18))]:
            file.write_bytes(content[:length])
            with pytest.warns(UserWarning, match=f"checkpoint-4/{name}"):
                assert checkpoint.latest(run).step == 2
        file.write_bytes(content)
    assert whole(run).step == 4


def test_1000_random_bit_flips_are_all_noticed(tmp_path):
    folder = save(tmp_path, 2)
    contents = {p: p.read_bytes() for p in sorted(folder.iterdir())}
    numbers = random.Random(0)
    for n in range(1000):
        file = list(contents)[n % 3]
        bad = bytearray(contents[file])
        bit = numbers.randrange(len(bad) * 8)
        bad[bit // 8] ^= 1 << bit % 8
        file.write_bytes(bad)
        with pytest.raises(CheckpointError, match="is not what was written"):
            checkpoint.read(folder)
        file.write_bytes(contents[file])
    assert whole(tmp_path).step == 2


@pytest.mark.parametrize("saves", [60, pytest.param(1000, marks=pytest.mark.long)])
def test_many_saves_leave_nothing_behind(tmp_path, saves):
    descriptors = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    for step in range(1, saves + 1):
        save(tmp_path, step)
        checkpoint.prune(tmp_path, 3, keep=set(), after=step)
    kept = {f"checkpoint-{step}" for step in range(saves - 2, saves + 1)}
    assert {p.name for p in tmp_path.iterdir()} == kept
    if descriptors:
        assert len(os.listdir("/proc/self/fd")) == descriptors


# room on the disk


def megabytes(monkeypatch, free):
    usage = shutil.disk_usage("/")._replace(free=int(free * 1e6))
    monkeypatch.setattr(files.shutil, "disk_usage", lambda folder: usage)


def test_room_is_checked_before_the_start_and_before_each_save(config, monkeypatch):
    megabytes(monkeypatch, 0.01)
    with pytest.raises(CheckpointError, match=r"0\.\d MB are needed .* and 0\.0 MB are free"):
        train(config)
    monkeypatch.undo()
    steps = iter(train(config.replace(checkpointing_steps=1)))
    next(steps)
    megabytes(monkeypatch, 0.01)
    with pytest.raises(CheckpointError, match="too full for a checkpoint"):
        next(steps)
    monkeypatch.undo()
    assert whole_run(config) == 1
    assert [s.step for s in train(config)] == [2, 3, 4]


def whole_run(config) -> int:
    return checkpoint.latest(Path(config.output_dir)).step


def test_a_disk_that_fills_up_during_training_ends_it_in_one_sentence(config):
    """Whichever operation is the first to fail: one error of ours, what was saved is whole, the same call goes on."""

    def fail():
        raise OSError(errno.ENOSPC, "No space left on device")

    count = At(None)
    with watched(config.output_dir, count):
        list(train(config.replace(checkpointing_steps=1)))
    begun = count.names.index("fsync", 20)
    for k in range(begun, len(count.names) - 5, (len(count.names) - begun) // 5):
        here = config.replace(checkpointing_steps=1, output_dir=f"{config.output_dir}-{k}")
        hook = At(k, fail, lasts=True)
        with pytest.raises(CheckpointError, match="MB are free"), watched(here.output_dir, hook):
            list(train(here))
        list(train(here))
        assert whole_run(here) == 4


# a whole run


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("kills", [6, pytest.param(100, marks=pytest.mark.long)])
def test_kills_at_random_moments_of_a_run(config, lives, kills):
    """One run, killed and begun again by the same call; in the end it is the run that nobody killed."""
    config = config.replace(checkpointing_steps=2, max_train_steps=60, checkpoints_total_limit=2)
    straight = config.replace(output_dir=config.output_dir + "-straight")
    begun = time.monotonic()
    assert lives(straight) == 0, lives.said
    one_life = time.monotonic() - begun
    numbers, deaths = random.Random(1), 0
    while deaths < kills:  # a life that ends before its kill does not count
        deaths += lives(config, kill_after=numbers.uniform(0, one_life / 2)) == -signal.SIGKILL
        if checkpoint.found(Path(config.output_dir)) and whole_run(config) > 40:
            shutil.rmtree(config.output_dir)  # nearly done: from the start again
    assert lives(config) == 0, lives.said
    assert log_of(config).items() <= log_of(straight).items()
    ends = [whole_tensors(c) for c in (config, straight)]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[1])
    assert not [p for p in Path(config.output_dir).iterdir() if p.name.startswith(".")]
    print(f"{deaths} kills at random moments of a run of {one_life:.1f} s, all recovered")


def whole_tensors(config):
    return checkpoint.latest(Path(config.output_dir)).tensors


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("every", [16, pytest.param(1, marks=pytest.mark.long)])
def test_kill_9_at_every_file_operation_of_a_run(config, lives, every):
    """From the lock at the start to the last line of the history, also while a killed run begins again."""
    config = config.replace(max_train_steps=2, checkpointing_steps=1, checkpoints_total_limit=1)
    straight = config.replace(output_dir=config.output_dir + "-straight")
    for life in (config, straight):  # the first one also fills the cache, which is no part of a run
        assert lives(life) == 0, lives.said
    names = json.loads(Path(straight.output_dir + ".log.operations").read_text())
    points, deaths = range(len(names), 0, -every), 0
    for k in points:
        here = config.replace(output_dir=f"{config.output_dir}-{k}")
        deaths += lives(here, operation=k) == -signal.SIGKILL
        assert lives(here) == 0, lives.said
        ends = [whole_tensors(c) for c in (here, straight)]
        assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[1]), names[k - 1]
        left = [{p.name for p in Path(c.output_dir).iterdir()} for c in (here, straight)]
        assert left[0] == left[1], (k, names[k - 1])
    assert (
        deaths >= len(points) - 2
    )  # a slow life has signs of life in its lock that a quick one has not
    print(f"{deaths} of {len(names)} file operations of a run, killed before each")


def test_a_run_killed_between_its_last_checkpoint_and_its_end_gets_its_file_afterwards(config):
    folder = Path(config.output_dir)
    list(train(config))
    file, history = folder / "pytorch_lora_weights.safetensors", folder / run_folder.HISTORY
    before, lines = load_file(file), history.read_text().splitlines(keepends=True)
    assert '"end"' in lines[-1]
    history.write_text("".join(lines[:-1]))
    file.unlink()
    with pytest.warns(UserWarning, match="already finished"):
        assert list(train(config)) == []
    after = load_file(file)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert run_folder.read_history(folder)[-1]["event"] == "end"


# two at once


def test_a_second_process_is_refused_and_a_left_lock_is_taken_over(config):
    folder = Path(config.output_dir)
    code = f"import time\nfrom pathlib import Path\nfrom lora_nb.lock import Lock\nLock(Path({str(folder)!r}))\n"
    code += "print('locked', flush=True)\ntime.sleep(600)\n"
    other = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert other.stdout.readline() == "locked\n"
    with pytest.raises(CheckpointError, match=f"Process {other.pid} on {socket.gethostname()}"):
        train(config)
    assert (folder / lock.FILE).is_file()  # the refusal took nothing away
    other.kill()
    other.communicate()
    assert [s.step for s in train(config)] == [1, 2, 3, 4]
    assert not (folder / lock.FILE).exists()


def test_a_lock_of_another_machine_counts_until_it_is_silent(config):
    file = Path(config.output_dir) / lock.FILE
    file.parent.mkdir()
    file.write_text(json.dumps({"pid": 1, "host": "elsewhere", "started": 0.0}))
    with pytest.raises(CheckpointError, match="on elsewhere is training"):
        train(config)
    long_ago = time.time() - lock.SILENT - 1
    os.utime(file, (long_ago, long_ago))
    assert len(list(train(config))) == 4


def test_a_number_that_another_process_got_since_is_no_owner(tmp_path):
    started = lock.psutil.Process(1).create_time()
    for born, free in ((started, False), (started - 3600, True)):
        owner = {"pid": 1, "host": socket.gethostname(), "started": born}
        (tmp_path / lock.FILE).write_text(json.dumps(owner))
        if free:
            lock.Lock(tmp_path).release()
        else:
            with pytest.raises(CheckpointError, match="Process 1 on"):
                lock.Lock(tmp_path)


def test_a_long_run_shows_that_it_lives(tmp_path, monkeypatch):
    held = lock.Lock(tmp_path)
    os.utime(held.file, (0, 0))
    held.refresh()
    assert held.file.stat().st_mtime == 0  # not yet due
    monkeypatch.setattr(lock, "REFRESHED", -1.0)
    held.refresh()
    assert time.time() - held.file.stat().st_mtime < 60


def test_a_loop_left_half_way_is_closed_when_the_same_run_begins_again(config):
    first = iter(train(config))
    assert next(first).step == 1
    assert [s.step for s in train(config)] == [2, 3, 4]  # it saved step 1 and let go
    assert list(first) == []
    lines = run_folder.read_history(config.output_dir)
    assert [line["step"] for line in lines if line["event"] == "step"] == [1, 2, 3, 4]


def test_a_run_cannot_begin_inside_its_own_loop(config):
    found = []

    def other_thread():
        try:
            train(config)
        except CheckpointError as error:
            found.append(str(error))

    training = train(config)
    make = training.cache.batch

    def meanwhile(positions):
        thread = threading.Thread(target=other_thread)
        thread.start()
        thread.join()
        return make(positions)

    training.cache.batch = meanwhile
    assert len(list(training)) == 4
    assert len(found) == 4
    assert all("This very process is training in that folder" in text for text in found)


def test_a_training_that_was_overtaken_refuses_to_run(config):
    old = train(config)
    assert len(list(train(config))) == 4
    with pytest.raises(CheckpointError, match="Another training has gone on"):
        list(old)
    assert whole_run(config) == 4


def test_a_folder_that_was_taken_away_is_not_written_to(config):
    steps = iter(train(config))
    next(steps)
    shutil.rmtree(config.output_dir)
    with pytest.raises(
        CheckpointError, match=r"history\.jsonl could not be written|no longer this training's"
    ):
        list(steps)
    assert not Path(config.output_dir).exists()


def test_a_failed_start_leaves_no_lock(config):
    list(train(config))
    with pytest.raises(CheckpointError, match="learning_rate was"):
        train(config.replace(learning_rate=1.0))
    assert not (Path(config.output_dir) / lock.FILE).exists()


def test_a_second_run_in_the_same_process_changes_nothing_of_the_first(config):
    """Other accumulation, precision and schedule, begun and ended while the first is half way."""
    other = config.replace(
        gradient_accumulation_steps=4, mixed_precision="bf16", lr_scheduler="linear",
        output_dir=config.output_dir + "-other",
    )  # fmt: skip
    alone = config.replace(output_dir=config.output_dir + "-alone")
    expected = [(s.loss, s.lr, s.images_seen) for s in train(alone)]
    first = iter(train(config))
    seen = [next(first)]
    assert [s.images_seen for s in train(other)] == [8, 16, 24, 32]
    seen += list(first)
    assert [(s.loss, s.lr, s.images_seen) for s in seen] == expected
    assert same_end(config, alone)


# numbers


def test_latents_stay_finite_where_the_vae_would_overflow_in_half_precision(tiny_sd):
    """The VAE is in float32 whatever the base is loaded in; in float16 this one overflows."""
    family = load_family("auto", str(tiny_sd), dtype=torch.float16)
    family.vae.encoder.conv_in.weight.data *= 1e6
    pixels = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert {w.dtype for w in family.vae.parameters()} == {torch.float32}
    assert {w.dtype for w in family.unet.parameters()} == {torch.float16}
    assert all(torch.isfinite(moment).all() for moment in family.moments(pixels))
    half = copy.deepcopy(family.vae).half()
    with torch.no_grad():
        assert not torch.isfinite(half.encode(pixels.half()).latent_dist.mean).all()


@pytest.mark.parametrize(
    ("bias", "words", "left"), [(-100.0, "all black", 3), (float("nan"), "not finite", 1)]
)
def test_black_samples_are_said_and_training_goes_on(config, bias, words, left):
    config = config.replace(
        validation_prompts=("a",),
        num_validation_images=1,
        num_inference_steps=1,
        validation_steps=2,
    )
    training = train(config)
    steps = with_samples(training)
    next(steps)
    training.family.vae.decoder.conv_out.bias.data.fill_(bias)
    with pytest.warns(UserWarning, match=words):
        assert [step.step for step in steps] == [2, 3, 4]
    alarms = [e for e in run_folder.read_history(config.output_dir) if e["event"] == "alarm"]
    assert [alarm["step"] for alarm in alarms] == [2, 4]
    assert len(list((Path(config.output_dir) / "samples").iterdir())) == left


DEVICES = {
    "cpu": env.Device("cpu", "float32", "", "", 16),
    "mps": env.Device("mps", "float32", "", "Apple", 16),
    "t4": env.Device("cuda", "float16", "", "Tesla T4", 16),
    "l4": env.Device("cuda", "bfloat16", "", "NVIDIA L4", 24),
}
REFUSED = {("cpu", "fp16"), ("mps", "fp16"), ("mps", "bf16")}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("asked", ["no", "fp16", "bf16"])
def test_a_precision_that_the_device_has_not_is_refused_or_said(device, asked):
    if (device, asked) in REFUSED:
        with pytest.raises(ConfigError, match=f"mixed_precision is '{asked}'"):
            precision.check(asked, DEVICES[device])
    elif (device, asked) == ("t4", "bf16"):
        with pytest.warns(UserWarning, match="Tesla T4 has not in hardware"):
            precision.check(asked, DEVICES[device])
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            precision.check(asked, DEVICES[device])


# the notebook

CELL = """
training = train(config)
for step in training:
    print(step.step, flush=True)
    time.sleep(pause)
print("interrupted", training.interrupted, "at", training.start_step)
"""
COUNT = """
from lora_nb import adapters, checkpoint
unet = training.family.unet
layers = sum(1 for _ in adapters.layers(unet))
state = checkpoint.latest(training.folder).tensors
total = sum(state[name].double().sum().item() for name in sorted(state))
print(layers, len(unet.peft_config), total)
"""


@pytest.mark.slow
def test_in_a_notebook_the_stop_button_a_second_run_and_a_killed_kernel(config):
    """One kernel: the cell is stopped and run again, then from the start twice; then a new kernel goes on."""
    straight = config.replace(output_dir=config.output_dir + "-straight", max_train_steps=8)
    list(train(straight))
    config = config.replace(max_train_steps=8, checkpointing_steps=2)
    setup = (
        "import os, time, warnings\nfrom lora_nb import TrainConfig, train\n"
        f"config = TrainConfig.from_dict({config.to_dict()!r})\nprint(os.getpid())\npause = 0.2"
    )
    again = "import dataclasses\nconfig = dataclasses.replace(config, overwrite=True, checkpointing_steps=500)"
    killed = CELL.replace("time.sleep(pause)", "step.step == 5 and os.kill(os.getpid(), 9)")

    notebook = nbformat.v4.new_notebook()
    client = NotebookClient(notebook, timeout=120, kernel_name="python3")

    def run(source: str, meanwhile=None) -> str:
        notebook.cells.append(nbformat.v4.new_code_cell(source))
        if meanwhile:
            threading.Thread(target=meanwhile).start()
        cell = client.execute_cell(notebook.cells[-1], len(notebook.cells) - 1)
        return "".join(
            o.text for o in cell.outputs if o.output_type == "stream" and o.name == "stdout"
        )

    with client.setup_kernel():
        kernel = int(run(setup))

        def press_stop():
            while not (history := Path(config.output_dir) / "history.jsonl").is_file() or (
                '"step": 3' not in history.read_text()
            ):
                time.sleep(0.02)
            os.kill(kernel, signal.SIGINT)

        stopped = run(CELL, press_stop)
        done = len(stopped.splitlines()) - 1
        assert 3 <= done < 8
        assert stopped.endswith(f"interrupted True at {done}\n")
        rest = run(f"pause = 0\n{CELL}")
        steps = [int(line) for line in rest.splitlines()[:-1]]
        assert steps == list(range(done + 1, 9))
        assert rest.endswith("interrupted False at 8\n")
        assert same_end(config, straight)
        run(again)
        ends = {run(CELL) and run(COUNT) for _ in range(3)}
        assert len(ends) == 1  # the same layers, one adapter, the same numbers
        assert next(iter(ends)).split()[1] == "1"
        assert same_end(config, straight)
    shutil.rmtree(config.output_dir)
    code = f"{setup}\n{killed}"
    dead = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=120)
    assert dead.returncode == -signal.SIGKILL
    assert [s.step for s in train(config)] == [5, 6, 7, 8]
    assert same_end(config, straight)


def same_end(a, b) -> bool:
    one, other = whole_tensors(a), whole_tensors(b)
    return all(torch.equal(one[name], other[name]) for name in other)


# memory over time


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("steps", [300, pytest.param(10_000, marks=pytest.mark.long)])
def test_resident_size_stays_flat(config, steps):
    """At most 1 MB per 1,000 steps after a warm-up, by a least-squares line; a MB of noise for short runs."""
    process = lock.psutil.Process()
    sizes = [
        (step.step, process.memory_info().rss / 1e6)
        for step in train(config.replace(max_train_steps=steps, train_batch_size=1))
        if step.step % 20 == 0
    ]
    late = torch.tensor([size for size in sizes if size[0] >= 100], dtype=torch.float64)
    x, y = (late - late.mean(0)).T
    slope = (x @ y / (x @ x)).item() * 1000
    print(f"{slope:+.3f} MB per 1,000 steps over {steps} steps")
    assert slope * max(steps, 1000) / 1000 <= max(1.0, steps / 1000)
