"""Checkpoints: atomic, verified, pruned with care."""

import json
import os

import pytest
import torch

from lora_nb import checkpoint
from lora_nb.errors import CheckpointError

TENSORS = {"adapter/unet/a": torch.arange(12.0).view(3, 4), "optimizer/0/step": torch.tensor(3.0)}


def save(run, step, scale=1.0):
    return checkpoint.save_checkpoint(
        run, step, {k: v * scale for k, v in TENSORS.items()}, {"run": "r1", "best": None}
    )


def test_what_goes_in_comes_out(tmp_path):
    save(tmp_path, 3)
    back = checkpoint.latest(tmp_path)
    assert back.step == 3
    assert back.meta["run"] == "r1"
    assert back.tensors.keys() == TENSORS.keys()
    assert all(torch.equal(back.tensors[k], TENSORS[k]) for k in TENSORS)


def test_files_are_readable_by_others_and_no_temporary_is_left(tmp_path):
    folder = save(tmp_path, 1)
    assert sorted(p.name for p in folder.iterdir()) == [
        "MANIFEST.json",
        "meta.json",
        "state.safetensors",
    ]
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-1"]


@pytest.mark.parametrize("name", ["state.safetensors", "meta.json", "MANIFEST.json"])
@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "gone"])
def test_a_damaged_checkpoint_is_passed_over_with_its_name(tmp_path, name, damage):
    save(tmp_path, 2)
    file = save(tmp_path, 4, 2.0) / name
    content = bytearray(file.read_bytes())
    if damage == "flip":
        content[len(content) // 2] ^= 1
    file.write_bytes(
        {"flip": bytes(content), "cut": bytes(content[:-5]), "empty": b"", "gone": b""}[damage]
    )
    if damage == "gone":
        file.unlink()
    if (name, damage) == ("MANIFEST.json", "gone"):  # without one it never counted
        assert checkpoint.latest(tmp_path).step == 2
        return
    with pytest.warns(UserWarning, match="checkpoint-4"):
        assert checkpoint.latest(tmp_path).step == 2


def test_random_bit_flips_are_all_noticed(tmp_path):
    folder = save(tmp_path, 1)
    g = torch.Generator().manual_seed(0)
    for name in ("state.safetensors", "meta.json"):
        good = (folder / name).read_bytes()
        for bit in torch.randint(0, len(good) * 8, (40,), generator=g).tolist():
            bad = bytearray(good)
            bad[bit // 8] ^= 1 << bit % 8
            (folder / name).write_bytes(bytes(bad))
            with pytest.raises(CheckpointError, match=name):
                checkpoint.verify(folder)
        (folder / name).write_bytes(good)
    checkpoint.verify(folder)


def test_stray_folders_are_ignored(tmp_path):
    save(tmp_path, 2)
    for name in (
        "checkpoint-best",
        "checkpoints",
        "checkpoint-6.tmp",
        "checkpoint-9",
        "checkpoint-x1",
    ):
        (tmp_path / name).mkdir()
    assert checkpoint.latest(tmp_path).step == 2


def test_a_killed_save_leaves_the_old_one_and_is_swept(tmp_path, monkeypatch):
    save(tmp_path, 2)
    real, calls = os.fsync, []

    def killed(descriptor):
        calls.append(descriptor)
        if len(calls) == 2:
            raise KeyboardInterrupt
        real(descriptor)

    monkeypatch.setattr(os, "fsync", killed)
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path, 4)
    monkeypatch.undo()
    assert checkpoint.latest(tmp_path).step == 2
    checkpoint.sweep(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-2"]


def test_a_full_disk_says_how_much_is_missing(tmp_path, monkeypatch):
    save(tmp_path, 2)

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CheckpointError, match="MB are free"):
        save(tmp_path, 4)
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-2"]


def test_pruning_keeps_the_newest_and_the_best(tmp_path):
    for step in (2, 4, 6, 8):
        save(tmp_path, step)
    (tmp_path / "checkpoint-notes").mkdir()
    checkpoint.prune(tmp_path, 1, keep={4})
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "checkpoint-4",
        "checkpoint-8",
        "checkpoint-notes",
    ]
    checkpoint.prune(tmp_path, None, keep=set())
    assert len(checkpoint.found(tmp_path)) == 2


def test_the_manifest_lists_sizes_and_sums(tmp_path):
    folder = save(tmp_path, 1)
    listed = json.loads((folder / "MANIFEST.json").read_text())["files"]
    assert listed["state.safetensors"]["bytes"] == (folder / "state.safetensors").stat().st_size
