"""Branches of a run: a raised rank changes nothing at the fork, twins are equal, a replay gives the same bits."""

from pathlib import Path

import pytest
import torch

from lora_nb import checkpoint, run_folder
from lora_nb.branching import fork, paired_losses, paired_probes, replay
from lora_nb.config import LoraSpec
from lora_nb.errors import CheckpointError, ConfigError
from lora_nb.loss import diffusion_loss
from lora_nb.trainer import train


@pytest.fixture
def parent(config):
    """Four steps of six, a checkpoint at each, both parts, alpha given for one of them."""
    lora = {"unet": LoraSpec(rank=2, lora_alpha=3), "text_encoder": LoraSpec(rank=2)}
    config = config.replace(lora=lora, max_train_steps=6, checkpointing_steps=1, probe_steps=2)
    for step in train(config):
        if step.step == 4:
            break
    return Path(config.output_dir)


def state_of(folder):
    return checkpoint.latest(Path(folder)).tensors


def same(a, b):
    one, other = state_of(a), state_of(b)
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def losses(training):
    batch = training.cache.batch([100, 101, 102, 103])
    with torch.no_grad():
        return diffusion_loss(training.family, batch).per_image


def contents(folder):
    return {p: p.read_bytes() for p in Path(folder).rglob("*") if p.is_file() and p.name != ".lock"}


@pytest.mark.parametrize(("rank", "alpha"), [(2, None), (5, None), (5, 20.0), (2, 1.0)])
def test_a_fork_begins_as_the_same_function_and_then_goes_its_own_way(
    parent, tmp_path, rank, alpha
):
    config = run_folder.read_config(parent)
    before = train(config)  # at step 4
    expected, grown = losses(before), before.parameters * rank // 2
    next(iter(before))  # its own step 5
    later = losses(before)
    before.lock.release()
    untouched = contents(parent)
    branch = fork(parent, tmp_path / "branch", rank=rank, alpha=alpha, step=4)
    assert branch.start_step == 4
    assert branch.parameters == grown
    assert branch.learner.lora["unet"].scale == pytest.approx((alpha or 1.5 * rank) / rank)
    torch.testing.assert_close(losses(branch), expected, rtol=0, atol=1e-6)
    step = next(iter(branch))
    assert step.step == 5
    assert (losses(branch) - expected).abs().max() > 1e-5  # it learns
    same_way = torch.allclose(losses(branch), later, rtol=0, atol=1e-6)
    assert same_way == (rank == 2 and alpha is None)
    assert contents(parent) == untouched


def test_fresh_rows_of_a_fork_are_those_of_a_fresh_adapter_and_its_moments_are_zero(
    parent, tmp_path
):
    branch = fork(parent, tmp_path / "branch", rank=5)
    old, new = state_of(parent), state_of(branch.folder)
    for name, value in old.items():
        kind, part, key = name.split("/", 2)
        rows = tuple(slice(size) for size in value.shape)
        assert torch.equal(new[name][rows], value)
        if kind == "adapter" and "lora_A" in key:
            assert torch.equal(new[name][2:], branch.learner.untrained[part][key][2:])
        else:
            assert new[name].abs().sum() == pytest.approx(value.abs().sum())  # zeros around it


def test_twins_are_equal_and_pair_up(parent, tmp_path):
    for name, changes in (("a", {}), ("b", {}), ("slow", {"learning_rate": 1e-3})):
        for _ in fork(parent, tmp_path / name, step=3, **changes):
            pass
    assert same(tmp_path / "a", tmp_path / "b")
    assert not same(tmp_path / "a", tmp_path / "slow")
    assert {pair.mean for pair in paired_losses(tmp_path / "a", tmp_path / "b").values()} == {0.0}
    pairs = paired_losses(tmp_path / "a", tmp_path / "slow")
    assert list(pairs) == [1, 2, 3, 4, 5, 6]  # the common past, and one draw each after that
    assert [pairs[s].mean == 0 for s in pairs] == [True] * 4 + [False] * 2  # 4 is drawn before it
    probes = paired_probes(tmp_path / "a", tmp_path / "slow")
    assert probes[2].mean == 0
    assert probes[6].mean != 0
    a, slow = (
        [e for e in run_folder.read_history(tmp_path / name) if e["event"] == "probe"][-1]
        for name in ("a", "slow")
    )
    assert probes[6].mean == pytest.approx(slow["loss"] - a["loss"], abs=1e-6)


def test_a_fork_tells_where_it_comes_from_and_goes_on_when_called_again(parent, tmp_path):
    branch = fork(parent, tmp_path / "branch", rank=3, step=3)
    next(iter(branch))
    again = fork(parent, tmp_path / "branch", rank=3, step=3)
    assert again.start_step == 4
    assert [s.step for s in again] == [5, 6]
    meta = checkpoint.latest(tmp_path / "branch").meta
    run = checkpoint.read(parent / "checkpoint-3").meta["run"]
    assert meta["forked_from"] == {"run": run, "step": 3, "folder": str(parent)}
    assert meta["run"] != run
    events = run_folder.read_history(tmp_path / "branch")
    assert [e["step"] for e in events if e["event"] == "step"] == [1, 2, 3, 4, 5, 6]
    assert [e["step"] for e in events if e["event"] == "fork"] == [3]


def test_a_fork_refuses_what_it_cannot_do(parent, tmp_path, config):
    with pytest.raises(ConfigError, match="rank of unet is 2 and can only grow in a fork"):
        fork(parent, tmp_path / "x", rank=1)
    with pytest.raises(CheckpointError, match=r"no checkpoint-9 in .*found: checkpoint-4, check"):
        fork(parent, tmp_path / "x", step=9)
    with pytest.raises(ConfigError, match="max_train_steps is 4 and the fork begins after step 4"):
        fork(parent, tmp_path / "x", max_train_steps=4)
    with pytest.raises(ConfigError, match="keeps its parts and target_modules"):
        fork(parent, tmp_path / "x", lora={"unet": LoraSpec(rank=2)})
    with pytest.raises(CheckpointError, match="another run than this fork"):
        fork(parent, parent)
    assert fork(parent, tmp_path / "x").start_step == 4  # none of these left anything in the way


# what is changed in mid-run


def trained(config, changes, stop=None):
    """Train with changes of the learning rate made as a hand does, after these steps."""
    training = train(config)
    for step in training:
        if step.step in changes:
            training.rates.multiply(changes[step.step])
        if step.step == stop:
            break
    return training


def rates(folder):
    events = run_folder.read_history(folder)
    return {e["step"]: e["lr"]["unet"] for e in events if e["event"] == "step"}


def test_another_learning_rate_counts_from_the_next_step_and_a_replay_is_equal(config, tmp_path):
    config = config.replace(max_train_steps=6, lr_scheduler="cosine", lr_warmup_steps=0)
    trained(config, {2: 0.5, 4: 3.0})
    plain = config.replace(output_dir=str(tmp_path / "plain"))
    trained(plain, {})
    factors = [1, 1, 0.5, 0.5, 3, 3]
    expected = [r * f for r, f in zip(rates(plain.output_dir).values(), factors, strict=True)]
    assert list(rates(config.output_dir).values()) == pytest.approx(expected, rel=1e-12)
    assert not same(config.output_dir, plain.output_dir)
    assert len(list(replay(config.output_dir, tmp_path / "again"))) == 6
    assert same(config.output_dir, tmp_path / "again")
    assert rates(tmp_path / "again") == rates(config.output_dir)
    with pytest.raises(CheckpointError, match="holds a run already"):
        list(replay(config.output_dir, tmp_path / "again"))


def test_a_resumed_run_keeps_what_was_changed_before_and_after_its_checkpoint(config, tmp_path):
    config = config.replace(max_train_steps=8, checkpointing_steps=3)
    trained(config, {2: 0.5, 4: 3.0})
    cut = config.replace(output_dir=str(tmp_path / "cut"))
    trained(cut, {2: 0.5, 4: 3.0}, stop=5)
    for folder in checkpoint.found(Path(cut.output_dir)):  # as if it had been killed at step 5
        if checkpoint.step_of(folder) > 3:
            checkpoint.discard(folder)
    assert [s.step for s in train(cut)] == [4, 5, 6, 7, 8]
    assert same(config.output_dir, cut.output_dir)
    assert rates(cut.output_dir) == rates(config.output_dir)
    changes = [e for e in run_folder.read_history(cut.output_dir) if e["event"] == "change"]
    assert [(e["step"], e["learning_rate_factor"]) for e in changes] == [(2, 0.5), (4, 3.0)]
    # who goes back to a checkpoint by name takes another way from there
    back = train(config.replace(resume_from_checkpoint="checkpoint-3", max_train_steps=9))
    assert back.rates.changes == {2: 0.5}
    list(back)
    assert run_folder.changes(run_folder.read_history(config.output_dir)) == {2: 0.5}


def test_a_replay_follows_longer_runs_and_forks(config, tmp_path):
    config = config.replace(
        max_train_steps=3, lr_scheduler="linear", lr_warmup_steps=0, checkpointing_steps=1
    )
    trained(config, {1: 2.0})
    trained(config.replace(max_train_steps=6), {4: 0.5}, stop=5)  # another slope from here on
    assert [s.step for s in replay(config.output_dir, tmp_path / "again")] == [1, 2, 3, 4, 5]
    assert same(config.output_dir, tmp_path / "again")
    branch = fork(config.output_dir, tmp_path / "branch", rank=3, step=4)
    assert branch.rates.changes == {1: 2.0}
    for step in branch:
        if step.step == 5:
            branch.rates.multiply(0.1)
    assert [s.step for s in replay(tmp_path / "branch", tmp_path / "branch again")] == [5, 6]
    assert same(tmp_path / "branch", tmp_path / "branch again")


def test_a_learning_rate_must_stay_finite_and_positive(config):
    training = train(config)
    for factor in (0, -1, float("nan"), float("inf")):
        with pytest.raises(ConfigError, match="cannot be multiplied"):
            training.rates.multiply(factor)


def test_changes_of_a_history_survive_json(tmp_path):
    run_folder.append(tmp_path, {"event": "change", "step": 3, "learning_rate_factor": 0.25})
    assert run_folder.changes(run_folder.read_history(tmp_path)) == {3: 0.25}
    run_folder.rewind(tmp_path, 0, {3: 0.25})
    assert len(run_folder.read_history(tmp_path)) == 1
    run_folder.rewind(tmp_path, 9)
    assert run_folder.read_history(tmp_path) == []


def test_runs_of_other_draws_do_not_pair(parent, config, tmp_path):
    other = config.replace(output_dir=str(tmp_path / "other"), seed=4)
    list(train(other))
    with pytest.raises(CheckpointError, match="not trained on the same draws"):
        paired_losses(parent, tmp_path / "other")
    assert paired_losses(parent, parent)[1].mean == 0
