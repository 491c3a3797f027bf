"""Nothing of a person or an account leaves: tokens, home folders, uploads, network; and no file runs code."""

import ast
import json
import os
import pickle
import re
import socket
import struct
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
import torch
from nbformat.v4 import new_code_cell, new_notebook, new_output
from packaging.version import Version
from safetensors.torch import save

from lora_nb import checkpoint
from lora_nb.errors import CheckpointError, DataError, FormatError
from lora_nb.formats import inspect, read_header
from lora_nb.redaction import in_notebook, redacted
from lora_nb.report import write_card, write_report

REPO = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((REPO / "notebooks").glob("*.ipynb"))
CANARY = "hf_" + "Zx9canary" * 4
SECRETS = {
    "Hugging Face token": CANARY,
    "API key": "sk-" + "proj_9" * 5,
    "GitHub token": "ghp_" + "a1B2" * 9,
    "wandb or Kaggle key": '{"username":"jane","key":"' + "0a1b2c3d" * 4 + '"}',
    "password or token": 'password = "correct-horse"',
    "home folder": "/home/jane/pictures",
}


# Notebooks


@pytest.mark.parametrize("path", NOTEBOOKS, ids=[path.stem for path in NOTEBOOKS])
def test_committed_notebooks_hold_no_secret(path):
    assert in_notebook(path.read_bytes(), path.name) == []


@pytest.mark.parametrize("kind", SECRETS)
@pytest.mark.parametrize("place", ["source", "output", "metadata", "widget", "lines"])
def test_a_secret_in_a_notebook_is_found_and_not_repeated(kind, place):
    notebook, secret = new_notebook(cells=[new_code_cell("x = 1")]), SECRETS[kind]
    assert in_notebook(nbformat.writes(notebook).encode(), "n.ipynb") == []
    cell = notebook.cells[0]
    if place == "source":
        cell.source = f"login({secret!r})"
    elif place == "output":
        cell.outputs = [new_output("stream", text=f"logged in with {secret}\n")]
    elif place == "metadata":
        notebook.metadata["papermill"] = {"input": [{"path": secret}]}
    elif place == "widget":
        notebook.metadata["widgets"] = {"state": {"a1": {"value": secret}}}
    content = nbformat.writes(notebook).encode()
    if place == "lines":
        halves = [secret[: len(secret) // 2], secret[len(secret) // 2 :]]
        content = json.dumps({"cells": [{"source": halves}]}).encode()
    found = in_notebook(content, "n.ipynb")
    assert kind in [finding.kind for finding in found]
    assert all(secret not in finding.where + finding.kind for finding in found)


def test_a_secret_is_known_by_its_key():
    assert (
        in_notebook(b'{"metadata": {"hub_token": "0123456789abc"}}', "n")[0].kind
        == "password or token"
    )
    assert in_notebook(b'{"metadata": {"tokenizer": "0123456789abc"}}', "n") == []


@pytest.mark.parametrize("content", [b"", b"[]", b"\xff", b"[" * 100_000, b"7"])
def test_what_is_no_notebook_is_said(content):
    with pytest.raises(DataError, match=r"n\.ipynb is no notebook"):
        in_notebook(content, "n.ipynb")


@pytest.mark.parametrize("kind", SECRETS)
def test_written_texts_are_redacted(kind):
    text = redacted(f"before {SECRETS[kind]} after")
    assert "jane/" not in text
    assert not any(
        word in text for word in (CANARY[5:], "proj_9", "a1B2a1B2", "0a1b2c3d0a", "correct-horse")
    )
    assert text.startswith("before ")
    assert text.endswith("after")


# A run with tokens all around


def files_with(folder: Path, secret: str) -> list[str]:
    return [str(f) for f in folder.rglob("*") if f.is_file() and secret.encode() in f.read_bytes()]


@pytest.fixture(scope="module")
def canary_run(tiny_sd, pictures, tmp_path_factory) -> tuple[Path, str]:
    """A run by the command line in a process without torchvision, with a token in each place that has one."""
    folder = tmp_path_factory.mktemp("jane-canary") / "run"
    program = (
        "import sys; sys.modules['torchvision'] = None\n"
        "from lora_nb.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    arguments = [
        "train", "--pretrained_model_name_or_path", tiny_sd, "--train_data_dir", pictures, "--resolution", 16,
        "--train_batch_size", 2, "--max_train_steps", 2, "--checkpointing_steps", 1, "--output_dir", folder,
        "--seed", 0, "--report_to", "tensorboard", "--hub_token", CANARY,
    ]  # fmt: skip
    names = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY", "KAGGLE_KEY", "OPENAI_API_KEY")
    done = subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)],
        env=os.environ | dict.fromkeys(names, CANARY), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return folder, done.stdout + done.stderr


def test_no_token_in_any_file_or_stream_of_a_run(canary_run):
    folder, printed = canary_run
    write_card(folder)
    write_report(folder)
    assert len([f for f in folder.rglob("*") if f.is_file()]) > 8
    assert list(folder.rglob("events.out.tfevents*"))  # the tracker that leaks elsewhere did run
    assert files_with(folder, CANARY) == []
    assert CANARY not in printed
    assert "hub_token does nothing here" in printed


def test_card_and_report_name_no_folder_of_the_user(canary_run, tiny_sd, pictures):
    folder, _ = canary_run
    for file in (write_card(folder), write_report(folder)):
        text = file.read_text(encoding="utf-8")
        for path in (folder.parent, tiny_sd, pictures, Path.home()):
            assert f"{path}/" not in text
        assert "jane-canary" not in text


def test_no_token_in_an_error(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "lora_nb", "train", "--hub_token", CANARY, "--train_data_dir", str(tmp_path / "gone")],
        env=os.environ | {"HF_TOKEN": CANARY}, capture_output=True, text=True, check=False, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 2
    assert "does not exist" in done.stderr
    assert CANARY not in done.stdout + done.stderr
    assert files_with(tmp_path, CANARY) == []


# Code of others, uploads, network

FORBIDDEN = {"trust_remote_code", "custom_pipeline", "allow_pickle"}
UPLOADS = {"upload_folder", "upload_file", "push_to_hub", "create_repo", "create_commit", "HfApi"}
DANGEROUS = {"torch.load", "pickle.load", "pickle.loads", "os.system", "eval", "exec"}


def sources() -> dict[str, ast.AST]:
    """Everything that ships as code: package, scripts, builders of the data, code cells."""
    found = {}
    for folder in ("lora_nb", "scripts", "data/build"):
        for file in sorted((REPO / folder).rglob("*.py")):
            found[str(file.relative_to(REPO))] = ast.parse(file.read_text(encoding="utf-8"))
    for path in NOTEBOOKS:
        for i, cell in enumerate(nbformat.read(path, as_version=4).cells):
            if cell.cell_type == "code":
                plain = re.sub(r"^(\s*)[!%].*$", r"\1pass", cell.source, flags=re.MULTILINE)
                found[f"{path.name}[{i}]"] = ast.parse(plain)
    return found


def lists_only(call: ast.Call) -> bool:
    """Our own upload, told to send nothing."""
    told = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
    return ast.unparse(call.func) == "lora_nb.push_to_hub" and told.get("dry_run") == "True"


def dangers(tree: ast.AST) -> list[str]:
    """Keywords, calls and names that run code of others or send files away."""
    words = []
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    listing = {id(call.func) for call in calls if lists_only(call)}
    for node in ast.walk(tree):
        if id(node) in listing:
            continue
        if isinstance(node, ast.keyword) and node.arg in FORBIDDEN:
            words.append(node.arg)
        elif isinstance(node, ast.keyword) and node.arg == "shell":
            words.append("shell")
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in DANGEROUS:
            words.append(ast.unparse(node.func))
        elif isinstance(node, ast.Attribute | ast.Name):
            name = node.attr if isinstance(node, ast.Attribute) else node.id
            words += [name] if name in UPLOADS else []
    return words


def test_nothing_that_ships_runs_foreign_code_or_uploads():
    found = sources()
    assert len(found) > 50
    dangerous = {name: set(words) for name, tree in found.items() if (words := dangers(tree))}
    uploads = {"HfApi", "create_repo", "create_commit"}  # on demand, of a list: tests/test_hub.py
    assert dangerous == {"lora_nb/hub.py": uploads, "lora_nb/cli.py": {"push_to_hub"}}


@pytest.mark.parametrize(
    "source",
    [
        "load(x, trust_remote_code=True)",
        "P(custom_pipeline='x')",
        "torch.load(f)",
        "HfApi().upload_folder('x')",
        "lora_nb.push_to_hub(run, 'me/ink')",
        "model.push_to_hub('me/ink', dry_run=True)",
        "exec('1')",
    ],
)
def test_a_danger_is_found(source):
    assert dangers(ast.parse(source))


def test_the_network_is_closed_in_tests_and_in_their_processes():
    for connect in (
        lambda: socket.create_connection(("93.184.216.34", 80), timeout=1),
        lambda: socket.getaddrinfo("huggingface.co", 443),
    ):
        with pytest.raises(OSError, match="the network is blocked in tests"):
            connect()
    program = "import socket; socket.getaddrinfo('huggingface.co', 443)"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert "the network is blocked in tests" in done.stderr
    assert os.environ["HF_HUB_OFFLINE"] == "1"


def test_locked_versions_are_past_the_known_holes():
    lines = (REPO / "constraints" / "cpu-lock.txt").read_text(encoding="utf-8").splitlines()
    lock = dict(line.split("==") for line in lines if "==" in line)
    # CVE-2025-32434 and CVE-2026-24747; CVE-2026-44513; paths in archives (datasets #8324)
    for name, least in {
        "torch": "2.10",
        "diffusers": "0.38",
        "datasets": "5.2.0",
        "pillow": "12",
    }.items():
        assert Version(lock[name].split("+")[0]) >= Version(least)
    assert "torchvision" not in lock


# Files that are traps


class Evil:
    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return (Path.touch, (self.mark,))


@pytest.mark.parametrize(
    "name",
    ["state.safetensors", "meta.json", "MANIFEST.json", "optimizer.bin", "random_states_0.pkl"],
)
def test_a_pickle_in_a_checkpoint_is_never_run(tmp_path, name):
    tensors, mark = {"adapter/a": torch.ones(3)}, tmp_path / "ran"
    folder = checkpoint.save_checkpoint(tmp_path, 3, tensors, {"run": "r"})
    (folder / name).write_bytes(pickle.dumps(Evil(mark)))
    if name in ("optimizer.bin", "random_states_0.pkl"):  # not of ours, so not read
        assert checkpoint.read(folder).step == 3
    else:
        with pytest.raises(CheckpointError, match="checkpoint-3"):
            checkpoint.read(folder)
    assert not mark.exists()


def with_length(length: int, body: bytes = b"{}") -> bytes:
    return struct.pack("<Q", length) + body


TRAPS = {
    "a header of 2^63 bytes": with_length(2**63),
    "a header of 90 MB that is not there": with_length(90_000_000),
    "a nested header": with_length(60_000, b"[" * 60_000),
    "an offset beyond the end": with_length(
        62, b'{"a":{"dtype":"F32","shape":[9,9],"data_offsets":[0,9999999]}}'
    ),
    "a shape of 2^60 numbers": with_length(
        76,
        b'{"a":{"dtype":"F32","shape":[1073741824,1073741824],"data_offsets":[0,4]}}    \0\0\0\0',
    ),
    "a zip": b"PK\x03\x04" + bytes(99),
    "a gzip": b"\x1f\x8b\x08" + bytes(99),
    "metadata that is a number": with_length(22, b'{"__metadata__":{"a":1}}'),
}


@pytest.mark.parametrize("trap", TRAPS)
def test_traps_as_lora_files_are_refused_in_no_time(tmp_path, trap):
    file = tmp_path / "x.safetensors"
    file.write_bytes(TRAPS[trap])
    for read in (read_header, inspect):
        with pytest.raises(FormatError, match=r"x\.safetensors"):
            read(file)


@pytest.mark.parametrize(
    "metadata",
    [
        "not json",
        "[]",
        "7",
        '"x"',
        "[" * 5000,
        '{"unet.lora_alpha": "x"}',
        '{"unet.alpha_pattern": 3}',
    ],
)
def test_metadata_that_is_no_metadata_is_one_sentence(tmp_path, metadata):
    file = tmp_path / "x.safetensors"
    tensors = {
        "unet.a.lora.down.weight": torch.ones(2, 4),
        "unet.a.lora.up.weight": torch.ones(4, 2),
    }
    file.write_bytes(save(tensors, metadata={"lora_adapter_metadata": metadata}))
    with pytest.raises(FormatError, match=r"x\.safetensors"):
        inspect(file)
