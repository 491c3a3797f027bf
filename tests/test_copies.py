"""Runs that outlive their machine: copies that are read back, and what comes back from them; the session's end."""

import json
import shutil
import time
from pathlib import Path

import psutil
import pytest

from lora_nb import env
from lora_nb.errors import CheckpointError, ConfigError
from lora_nb.run_folder import read_history
from lora_nb.stopping import BEFORE_THE_END
from lora_nb.trainer import train


@pytest.fixture
def drive(tmp_path, monkeypatch) -> Path:
    """A place that outlives this machine."""
    monkeypatch.setenv("LORA_NB_KEEP", str(tmp_path / "drive"))
    return tmp_path / "drive"


@pytest.fixture
def run(config):
    """A run of the workspace with two checkpoints."""
    return config.replace(output_dir=str(env.run_dir("mine")), checkpointing_steps=2)


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_a_finished_run_lies_in_both_places(run, drive):
    list(train(run))
    assert contents(drive / "mine") == contents(Path(run.output_dir))
    assert env.keep(Path(run.output_dir)) == []  # nothing is copied twice


def test_a_new_machine_goes_on_where_the_lost_one_was(run, drive):
    losses = [step.loss for step in train(run.replace(output_dir=str(env.run_dir("whole"))))]
    for step in train(run):
        if step.step == 3:
            break
    shutil.rmtree(run.output_dir)  # the machine is gone
    training = train(run)
    assert training.start_step == 3
    assert [step.loss for step in training] == losses[3:]
    assert contents(drive / "mine") == contents(Path(run.output_dir))


def test_what_is_here_is_not_written_over(run, drive):
    list(train(run))
    folder = Path(run.output_dir)
    shutil.rmtree(folder)
    folder.mkdir()
    (folder / "config.json").write_text("mine")
    env.bring_back(folder)
    assert (folder / "config.json").read_text() == "mine"
    assert (folder / "history.jsonl").is_file()
    for checkpoint in drive.rglob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    assert env.bring_back(folder) == []  # something is trained here: the copy is the older one


def test_need_looks_in_the_copies_too(run, drive):
    list(train(run))
    adapter = Path(run.output_dir) / "pytorch_lora_weights.safetensors"
    shutil.rmtree(run.output_dir)
    assert env.need(adapter, "03_training.ipynb").stat().st_size > 1000
    with pytest.raises(ConfigError, match=r"run 03_training.ipynb first"):
        env.need(env.run_dir("other") / "config.json", "03_training.ipynb")


def test_scratch_folders_are_not_kept(config, drive):
    list(train(config))
    assert not drive.exists()


def test_a_drive_that_drops_is_said_and_training_goes_on(run, drive):
    drive.write_text("not a folder")
    with pytest.warns(UserWarning, match="is Drive still mounted"):
        assert len(list(train(run))) == 4
    assert (Path(run.output_dir) / "checkpoint-4" / "MANIFEST.json").is_file()


def test_a_copy_that_reads_back_wrongly_is_not_kept(run, drive, monkeypatch):
    """A place that loses bytes: nothing with the true name appears there."""
    honest = shutil.copyfile

    def lossy(source, target):
        honest(source, target)
        Path(target).write_bytes(Path(target).read_bytes()[:-1])

    monkeypatch.setattr(shutil, "copyfile", lossy)
    with pytest.warns(UserWarning, match="read back differs"):
        list(train(run))
    assert contents(drive) == {}


def test_a_copy_that_cannot_be_read_back_stops_before_the_first_step(run, drive, monkeypatch):
    list(train(run))
    shutil.rmtree(run.output_dir)

    def broken(source, target):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(shutil, "copyfile", broken)
    with pytest.raises(CheckpointError, match="mount Drive again"):
        train(run)


def test_training_stops_with_a_checkpoint_before_the_session_ends(config, monkeypatch):
    age = time.time() - psutil.Process(min(psutil.pids())).create_time()
    monkeypatch.setenv("LORA_NB_SESSION_HOURS", str((age + BEFORE_THE_END + 5.0) / 3600))
    training = train(config.replace(max_train_steps=10_000))
    with pytest.warns(UserWarning, match="run the same again in a new session"):
        last = [step.step for step in training][-1]
    assert training.interrupted
    assert (training.folder / f"checkpoint-{last}" / "MANIFEST.json").is_file()
    events = read_history(training.folder)
    assert [event["event"] for event in events[-2:]] == ["session", "stop"]
    assert json.dumps(events[-1])
    # Asked again in the same session it goes on, with the checkpoints that it makes on the way.
    again = train(config.replace(max_train_steps=last + 2))
    assert [step.step for step in again] == [last + 1, last + 2]


def test_where_nobody_ends_a_session_nothing_is_known_of_its_end(monkeypatch):
    for name in ("COLAB_RELEASE_TAG", "KAGGLE_KERNEL_RUN_TYPE", "LORA_NB_SESSION_HOURS"):
        monkeypatch.delenv(name, raising=False)
    assert env.session_end() is None
    monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", "Interactive")
    assert env.session_end() > time.time() - 12 * 3600
