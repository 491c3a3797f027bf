"""An upload, spoken to a Hub of our own on this machine: what arrives, what never leaves, that it may be repeated."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
from hub_server import TOKEN, USER, serving

from lora_nb import cli, formats, hub
from lora_nb.config import DataSpec, LoraSpec, TrainConfig
from lora_nb.errors import CheckpointError, FormatError, HubError
from lora_nb.inference import export, with_samples
from lora_nb.report import write_report
from lora_nb.trainer import train

KOHYA = "pytorch_lora_weights_kohya"
ALLOWED = {
    ".gitattributes",  # the Hub's own
    "README.md",
    "pytorch_lora_weights.certificate.json",
    "pytorch_lora_weights.safetensors",
    f"{KOHYA}.certificate.json",
    f"{KOHYA}.safetensors",
    "report.html",
    *(f"samples/{label}-p{p}-s0.png" for label in ("base", "step-000004") for p in (0, 1)),
}


@pytest.fixture(scope="module")
def trained(tiny_sd, pictures, tmp_path_factory) -> Path:
    """Four steps with samples, a tracker's log, a Kohya file, and things that must not leave."""
    folder = tmp_path_factory.mktemp("jane-canary") / "run"
    config = TrainConfig(
        pretrained_model_name_or_path=str(tiny_sd), data=DataSpec(train_data_dir=str(pictures), resolution=16),
        lora={"unet": LoraSpec(rank=2)}, output_dir=str(folder), seed=3, train_batch_size=2, max_train_steps=4,
        learning_rate=1e-2, validation_prompts=("colour 1", "colour 2"), num_validation_images=2,
        validation_steps=2, num_inference_steps=1, report_to="tensorboard",
    )  # fmt: skip
    for _ in with_samples(train(config)):
        pass
    export(folder, folder / f"{KOHYA}.safetensors")
    write_report(folder)  # makes the adapter's certificate, which loads the base twice
    (folder / ".env").write_text(f"HF_TOKEN={TOKEN}")
    (folder / "notes.txt").write_text("private")
    (folder / "samples" / "mine.png").write_bytes(b"private")
    return folder


@pytest.fixture
def run(trained, tmp_path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "run"))


@pytest.fixture
def server(monkeypatch):
    with serving() as found:
        constants = huggingface_hub.constants
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", found.url)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield found


def test_what_arrives_and_nothing_else_and_twice_is_once(run, server, capfd):
    name = f"{USER}/ink"
    pushed = hub.push_to_hub(run, name)
    repo = server.repos[name]
    assert set(repo) == ALLOWED
    assert set(pushed.files) == ALLOWED - {".gitattributes"}
    for file in ALLOWED - {".gitattributes"}:
        assert repo[file] == (run / file).read_bytes()
    assert server.private[name]
    assert pushed.url == f"{server.url}/{name}/commit/{server.sha()}"
    assert f'load_lora_weights("{name}"' in repo["README.md"].decode()

    uploads = len(server.uploads)
    again = hub.push_to_hub(run, name, private=False)  # one that exists keeps what it is
    assert again == pushed
    assert (len(server.uploads), server.commits, server.private[name]) == (uploads, 1, True)

    (run / "samples" / "step-000004-p0-s0.png").write_bytes(
        (run / "samples" / "base-p0-s0.png").read_bytes()
    )
    hub.push_to_hub(run, name)
    assert server.commits == 2
    assert len(server.uploads) == uploads  # its bytes were there already
    _no_secret(run, server, capfd)


def _no_secret(run: Path, server, capfd) -> None:
    """The token is in no file of the run but the user's own, in nothing that was sent, and in nothing printed."""
    kept = [f.name for f in run.rglob("*") if f.is_file() and TOKEN.encode() in f.read_bytes()]
    assert kept == [".env"]
    for content in (
        *server.store.values(),
        *(v for repo in server.repos.values() for v in repo.values()),
    ):
        assert TOKEN.encode() not in content
        assert str(run.parent).encode() not in content
        assert b"jane-canary" not in content
    assert TOKEN not in "".join(capfd.readouterr()) + "".join(server.seen)


@pytest.mark.parametrize("kind", ["upload", "commit"])
def test_a_failed_upload_can_be_repeated(run, server, kind, capfd):
    server.breaks = {kind: 1}
    with pytest.raises(HubError, match="nothing is lost, run the same again") as error:
        hub.push_to_hub(run, "ink")
    assert "\n" not in str(error.value)
    assert TOKEN not in str(error.value)
    assert set(server.repos[f"{USER}/ink"]) == {".gitattributes"}  # all or nothing
    hub.push_to_hub(run, "ink")
    assert set(server.repos[f"{USER}/ink"]) == ALLOWED
    assert len(server.uploads) == len(set(server.uploads))  # what had arrived was not sent again
    _no_secret(run, server, capfd)


def test_the_wrong_token_and_somebody_elses_space(run, server, monkeypatch):
    with pytest.raises(HubError, match=r"status 403.*the token may not write there"):
        hub.push_to_hub(run, "grace/ink")
    wrong = "hf_" + "w" * 30
    with pytest.raises(HubError) as error:
        hub.push_to_hub(run, "ink", token=wrong)
    assert "401" in str(error.value) or "token" in str(error.value)
    assert wrong not in str(error.value)
    with pytest.raises(HubError, match="cannot take"):
        hub.push_to_hub(run, "a/b/c")
    assert server.repos == {}


def test_without_token_or_network_one_sentence(run, server, monkeypatch):
    monkeypatch.setattr(hub, "get_token", lambda: None)
    with pytest.raises(HubError, match=r"no Hub token here.*hf auth login"):
        hub.push_to_hub(run, "ink")
    monkeypatch.undo()
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with pytest.raises(HubError, match="HF_HUB_OFFLINE forbids"):
        hub.push_to_hub(run, "ink")


def test_a_hub_that_does_not_answer(run, server, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as unused:
        port = unused.getsockname()[1]
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{port}")
    with pytest.raises(
        HubError, match=r"could not be reached for ink \(.+\); nothing is lost"
    ) as error:
        hub.push_to_hub(run, "ink")
    assert TOKEN not in str(error.value)


def test_a_dry_run_lists_and_sends_nothing(run, server, capsys):
    assert cli.main(["push", str(run), "--repo_id", "ada/ink", "--dry_run"]) == 0
    said = capsys.readouterr().out
    assert set(re.findall(r"  (\S+)$", said, re.MULTILINE)) == ALLOWED - {".gitattributes"}
    assert server.seen == []


def test_what_has_no_adapter_or_names_a_folder_is_refused(run, server, tmp_path):
    with pytest.raises(CheckpointError, match="no run in"):
        hub.push_to_hub(tmp_path / "nothing", "ink")
    file = run / formats.FILE_NAME
    weights, before = formats.read_weights(file), file.read_bytes()
    for header in (
        {"base_model": "/home/jane/models/base"},
        {"trigger": "token = 'abcdefgh12345'"},
    ):
        formats.save_weights(weights, file, header)
        with pytest.raises(
            FormatError, match=r"names a folder or a secret of yours \((base_model|trigger)\)"
        ):
            hub.push_to_hub(run, "ink")
    file.unlink()
    with pytest.raises(FormatError, match="to share; train"):
        hub.push_to_hub(run, "ink")
    file.write_bytes(before)
    assert server.repos == {}


def test_training_pushes_at_the_end(config, tmp_path):
    """The command as published, in a process of its own: the endpoint by HF_ENDPOINT, the token by its flag."""
    with serving() as server:
        arguments = [
            "train", "--pretrained_model_name_or_path", config.pretrained_model_name_or_path,
            "--train_data_dir", config.data.train_data_dir, "--resolution", 16, "--train_batch_size", 2,
            "--max_train_steps", 2, "--output_dir", tmp_path / "mine", "--seed", 0,
            "--push_to_hub", "--hub_model_id", "ink", "--hub_token", TOKEN,
        ]  # fmt: skip
        names = {"HF_ENDPOINT": server.url, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
        done = subprocess.run(
            [sys.executable, "-m", "lora_nb", *map(str, arguments)],
            env=os.environ | names | {"HF_HOME": str(tmp_path / "hf")},
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert server.seen[0] == "GET /api/whoami-v2"  # asked before the first step
        repo = server.repos[f"{USER}/ink"]
        assert {"README.md", "report.html", formats.FILE_NAME} < set(repo)
        assert f"{USER}/ink is at {server.url}" in done.stdout
        assert json.loads(repo["pytorch_lora_weights.certificate.json"])["holds"]
        assert TOKEN not in done.stdout + done.stderr
        assert not [
            f for f in tmp_path.rglob("*") if f.is_file() and TOKEN.encode() in f.read_bytes()
        ]
        assert all(TOKEN.encode() not in content for content in repo.values())


def test_training_with_a_wrong_token_stops_before_the_first_step(config, server, capsys):
    arguments = [
        "train", "--pretrained_model_name_or_path", config.pretrained_model_name_or_path,
        "--train_data_dir", config.data.train_data_dir, "--resolution", "16", "--output_dir", config.output_dir,
        "--push_to_hub", "--hub_token", "hf_" + "x" * 20,
    ]  # fmt: skip
    assert cli.main(arguments) == 2
    assert "status 401" in capsys.readouterr().err
    assert not Path(config.output_dir).exists()
