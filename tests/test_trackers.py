"""Trackers get losses, probes and samples through accelerate, and nothing that was not meant for them."""

import importlib.util
import io
import json
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from lora_nb import cli, trackers
from lora_nb.errors import ConfigError
from lora_nb.inference import with_samples
from lora_nb.run_folder import read_history
from lora_nb.trainer import train

CANARY = "hf_" + "Tr4ckerCanary" * 3
NUMBERS = {"loss", "grad_norm", "lr/unet", "probe/difference"}


@pytest.fixture
def config(config):
    """Samples of two prompts, one of them with a token, every other step, and a probe at each."""
    return config.replace(
        validation_prompts=("colour 1", f"colour 2 {CANARY}"), num_validation_images=2, validation_steps=2,
        num_inference_steps=1, probe_steps=2,
    )  # fmt: skip


def run(config, tracker: str) -> tuple[Path, list[dict]]:
    """Train with that tracker; the run's folder and its steps by our own history."""
    for _ in with_samples(train(config.replace(report_to=tracker))):
        pass
    folder = Path(config.output_dir)
    return folder, [line for line in read_history(folder) if line["event"] == "step"]


def holding(folder: Path, text: str) -> list[str]:
    return [str(f) for f in folder.rglob("*") if f.is_file() and text.encode() in f.read_bytes()]


def test_tensorboard_gets_numbers_and_pictures(config):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder, steps = run(config, "tensorboard")
    where = folder / config.logging_dir / trackers.PROJECT
    read = EventAccumulator(str(where), size_guidance={"images": 0})
    read.Reload()
    assert set(read.Tags()["scalars"]) > NUMBERS
    losses = {event.step: event.value for event in read.Scalars("loss")}
    assert losses == pytest.approx({line["step"]: line["loss"] for line in steps}, rel=1e-6)
    assert [event.step for event in read.Scalars("probe/difference")] == [2, 4]
    pictures = read.Tags()["images"]
    assert {name.split("/")[1].split()[0] for name in pictures} == {"0", "1"}
    events = read.Images(pictures[0])
    assert {event.step for event in events} == {0, 2, 4}
    assert Image.open(io.BytesIO(events[0].encoded_image_string)).size == (32, 16)  # two seeds
    assert holding(where, CANARY) == []


def logged(content: bytes) -> list[bytes]:
    """The records of a log in LevelDB's form, as wandb keeps one: pieces of at most a block, whole or first to last."""
    block, header, found, place = 2**15, 7, [], 7  # wandb's own mark comes first
    while place + header <= len(content):
        if block - place % block < header:
            place += block - place % block
            continue
        size, kind = int.from_bytes(content[place + 4 : place + 6], "little"), content[place + 6]
        piece = content[place + header : place + header + size]
        if kind in (1, 2):
            found.append(piece)
        elif kind in (3, 4):
            found[-1] += piece
        place += header + size
    return found


def test_wandb_offline(config, monkeypatch, capfd):
    wandb = pytest.importorskip("wandb")
    from wandb.proto.wandb_internal_pb2 import Record

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_API_KEY", "0a1b2c3d" * 5)
    folder, steps = run(config, "wandb")
    wandb.teardown()  # its own process has written everything
    (file,) = folder.rglob("run-*.wandb")
    records = [Record.FromString(data) for data in logged(file.read_bytes())]
    told = [
        {(i.key or ".".join(i.nested_key)): json.loads(i.value_json) for i in record.history.item}
        for record in records
        if record.WhichOneof("record_type") == "history"
    ]
    assert {t["_step"]: t["loss"] for t in told if "loss" in t} == pytest.approx(
        {line["step"]: line["loss"] for line in steps}
    )
    assert [t["_step"] for t in told if "probe/difference" in t] == [2, 4]
    assert len(list(folder.rglob("media/images/samples/*.png"))) == 3 * 2 * 2
    for secret in (CANARY, "0a1b2c3d" * 5, str(folder.parent)):
        inside = [f for f in holding(folder / config.logging_dir, secret) if "/logs/" not in f]
        assert inside == []
    assert holding(folder, "0a1b2c3d" * 5) == []
    assert holding(folder / config.logging_dir, CANARY) == []
    assert CANARY not in "".join(capfd.readouterr())


TRACKIO = """
import sys
from lora_nb.config import TrainConfig
from lora_nb.inference import with_samples
from lora_nb.trainer import train
for _ in with_samples(train(TrainConfig.from_json(open(sys.argv[1]).read()))):
    pass
"""


def test_trackio(config, tmp_path, monkeypatch):
    """In a process of its own: its folder is fixed at import, and it starts a server."""
    pytest.importorskip("trackio")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    (tmp_path / "config.json").write_text(config.replace(report_to="trackio").to_json())
    command = [sys.executable, "-c", TRACKIO, str(tmp_path / "config.json")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=200)
    assert done.returncode == 0, done.stderr
    (file,) = (tmp_path / "trackio").rglob("lora_nb*.db")
    with sqlite3.connect(file) as database:
        rows = database.execute("SELECT step, metrics FROM metrics ORDER BY step").fetchall()
    losses = {step: json.loads(told)["loss"] for step, told in rows if "loss" in json.loads(told)}
    steps = [line for line in read_history(config.output_dir) if line["event"] == "step"]
    assert losses == pytest.approx({line["step"]: line["loss"] for line in steps})
    assert holding(tmp_path / "trackio", CANARY) == []
    assert holding(tmp_path / "trackio", str(config.output_dir)) == []
    assert len(list((tmp_path / "trackio").rglob("*.png"))) == 3 * 2


@pytest.mark.parametrize("name", trackers.KNOWN)
def test_a_tracker_that_is_not_installed_is_refused_before_the_first_step(
    config, monkeypatch, name, capsys
):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(
        ConfigError, match=f"'{name}', which is not installed here; pip install {name}"
    ):
        train(config.replace(report_to=name))
    arguments = [
        "--pretrained_model_name_or_path",
        config.pretrained_model_name_or_path,
        "--report_to",
        name,
    ]
    arguments += ["--train_data_dir", config.data.train_data_dir, "--output_dir", config.output_dir]
    assert cli.main(["train", *arguments]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert not Path(config.output_dir).exists()


def test_an_unknown_tracker_names_those_there_are(config):
    with pytest.raises(
        ConfigError, match="'tensorbord'; choose one of tensorboard, wandb, trackio, or all"
    ):
        train(config.replace(report_to="tensorbord"))


def test_a_tracker_that_does_not_start_is_said_before_the_first_step(config, monkeypatch):
    """The run can go on without it at once: nothing holds its folder."""
    folder = Path(config.output_dir)
    folder.mkdir()
    (folder / config.logging_dir).mkdir()
    (folder / config.logging_dir / trackers.PROJECT).write_text("no folder")
    training = train(config.replace(report_to="tensorboard"))
    with pytest.raises(
        ConfigError, match=r"The tracker tensorboard does not start \(\w+: .*leave out report_to"
    ):
        next(iter(training))
    assert not list(folder.glob("checkpoint-*"))
    assert sum(1 for _ in train(config)) == 4


def test_a_second_loop_opens_it_again(config):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    training = train(config.replace(report_to="tensorboard"))
    for step in training:
        if step.step == 2:
            break
    assert training.accelerator.trackers == []
    assert [step.step for step in training] == [3, 4]
    read = EventAccumulator(str(Path(config.output_dir) / config.logging_dir / trackers.PROJECT))
    read.Reload()
    assert [event.step for event in read.Scalars("loss")] == [1, 2, 3, 4]


def test_settings_are_flat_and_name_no_folder(config):
    told = trackers.settings(config.replace(pretrained_model_name_or_path="/home/jane/models/base"))
    assert told["lora.unet.rank"] == 2
    assert told["pretrained_model_name_or_path"] == "base"
    assert "/" not in told["output_dir"]
    assert CANARY not in str(told)
    assert all(isinstance(value, str | int | float | bool) for value in told.values())
