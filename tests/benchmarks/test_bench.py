"""The benchmark itself, at a size that takes seconds: equal work, plain data, tables; no time is pinned."""

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from PIL import Image

from lora_nb import bench
from lora_nb.bench import command, gpu, ground, parts, processes, tables, worker
from lora_nb.bench.draws import Draws
from lora_nb.bench.switches import SWITCHES
from lora_nb.config import TrainConfig
from lora_nb.errors import ConfigError
from lora_nb.families import widened
from lora_nb.families.shapes import SHAPES
from lora_nb.families.shapes import parts as modules

STANDIN = Path(bench.__file__).parent / "standin"


class Here(processes.Runner):
    """Jobs in this very process: starting one costs seconds, and equal losses need no clean process."""

    def start(self, job):
        with pytest.MonkeyPatch.context() as patch:
            own = {worker.SPAWNED: repr(time.time())} | job.get("environment", {})
            for name, value in own.items():
                patch.setenv(name, value)
            patch.setattr(sys, "argv", sys.argv)
            clock = worker.Clock()
            worker.KINDS[job["kind"]](json.loads(json.dumps(job)), clock)
        result = processes.Result(1.0, time.process_time(), 10**9, clock.steps, clock.found)
        return SimpleNamespace(wait=lambda: result)

    def in_turns(self, sides):
        return [[self.run(job) for job in jobs] for jobs in sides]


@pytest.fixture(scope="module")
def small(tiny_sd, tmp_path_factory):
    """A bench on the tests' base model and eight pictures of 16 pixels, against the plain loop."""
    folder = tmp_path_factory.mktemp("bench")
    shutil.copytree(tiny_sd, folder / "base")
    bench = parts.Bench(folder, None, rounds=1, steps=4, parity_steps=6, pictures=8, side=16)
    bench.runner = Here(folder)
    return bench


@pytest.fixture(scope="module")
def of_few_kinds(small, parity, tmp_path_factory):
    """The same on a network of one level: compiling takes g++ seconds for each kind of block, here three."""
    folder = tmp_path_factory.mktemp("few")
    shutil.copytree(small.folder / "base", folder / "base")
    UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16,),
        layers_per_block=1,
        attention_head_dim=2,
        cross_attention_dim=32,
        down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",),
        norm_num_groups=8,
    ).save_pretrained(folder / "base" / "unet")
    few = parts.Bench(folder, None, rounds=1, steps=4, pictures=8, side=16)
    few.runner, few.parity = Here(folder), parity
    return few


@pytest.fixture(scope="module")
def parity(small):
    return small.check_parity()


def test_our_loop_and_the_plain_one_have_equal_losses_on_equal_draws(parity):
    assert parity["no"] <= 1e-6
    assert parity["bf16"] <= 2e-3


def test_the_recorded_draws_are_of_every_step(small, parity):
    draws = Draws(small.folder / "draws.safetensors")
    assert len(draws.pixels) == len(draws.t) == len(draws.normal["noise"]) == 6 * 4
    assert all("lora_" in key for key in draws.weights)


@pytest.mark.long
def test_other_work_is_refused_before_any_speed(small, parity, monkeypatch):
    unlike = parts.Bench(small.folder, None, rounds=1, steps=3, parity_steps=6, pictures=8, side=16)
    monkeypatch.setitem(parts.GATES, "no", -1.0)
    with pytest.raises(processes.BenchError, match="not the same work"):
        parts.training(unlike)


ABOUT = {"machine": "here"}


@pytest.mark.parametrize(
    "part",
    [
        "training",
        "validation",
        *(pytest.param(part, marks=pytest.mark.long) for part in ("switches", "whole", "forecast")),
    ],
)
def test_a_part_is_plain_data_that_becomes_a_table(small, parity, part, request):
    compiles = part in ("training", "switches")
    bench = request.getfixturevalue("of_few_kinds") if compiles else small
    with torch._inductor.config.patch(compile_threads=1):  # no processes for that
        found = json.loads(json.dumps(parts.PARTS[part](bench)))
    text = tables.page({part: found | {"conditions": {"on": "x"}}}, ABOUT, "bench", None)
    assert "the plain loop" in text
    assert "nan" not in text
    expected = {
        "training": "| batch 4, float32 |",
        "switches": SWITCHES["cache"].title,
        "whole": "10 (reckoned",
        "validation": "| bf16 | not measured |",
        "forecast": "| whole run |",
    }
    assert expected[part] in text
    assert ("those rows are against its float32" in text) == (
        part == "training" and not widened.SUPPORTED
    )
    if part == "switches":
        assert all(r["difference"] <= r["allowed"] for r in found["rows"] if r["allowed"])


def test_a_step_is_the_median_without_the_first_ones():
    ends = [(2.0 * i, 1.0 * i, 0.5) for i in range(1, 10)]
    result = processes.Result(20.0, 10.0, 1, ends)
    assert result.per_step(0) == 2.0
    assert result.per_step(1) == 1.0


@dataclass(frozen=True)
class Counting(processes.Runner):
    """Jobs that only count, and write down whose step it is."""

    started: list[subprocess.Popen] = field(default_factory=list)

    def start(self, job):
        code = (
            "import json, pathlib, sys, time; from lora_nb.bench.worker import Clock; clock = Clock()\n"
            f"for step in range({job['steps']}):\n"
            f"    time.sleep(0.05); clock.tick(0.0); open({str(self.folder / 'order')!r}, 'a').write({job['name']!r})\n"
            f"assert {job['name']!r} != 'x'\n"
            f"pathlib.Path({str(self.folder / job['name'])!r}).write_text(json.dumps({{'steps': clock.steps}}))\n"
        )
        seen = self.environment | job["environment"] | {worker.SPAWNED: repr(time.time())}
        log = self.folder / f"{job['name']}.log"
        with log.open("w") as text:
            process = subprocess.Popen(
                [sys.executable, "-c", code], env=os.environ | seen, stderr=text
            )
        self.started.append(process)
        return processes.Running(process, time.perf_counter(), self.folder / job["name"], log)


def test_jobs_in_turns_run_a_few_steps_each_and_count_only_their_own_time(tmp_path):
    sides = [[{"name": "a", "steps": 7}], [{"name": "b", "steps": 9}]]
    [a], [b] = Counting(tmp_path).in_turns(sides)
    # A step is written down after the process has gone on.
    assert (tmp_path / "order").read_text() == "aabbaaabbbaabbbb"
    assert (len(a.steps), len(b.steps)) == (7, 9)
    assert max(y[0] - x[0] for x, y in itertools.pairwise(a.steps)) < 0.1


def test_jobs_of_one_side_run_together(tmp_path):
    sides = [[{"name": "a", "steps": 6}, {"name": "b", "steps": 3}], [{"name": "c", "steps": 6}]]
    [a, b], [c] = Counting(tmp_path).in_turns(sides)
    order = (tmp_path / "order").read_text()
    assert (len(a.steps), len(b.steps), len(c.steps)) == (6, 3, 6)
    # Of its three steps a turn each writes two down before it stops, and the third once it goes on.
    assert sorted(order[:4]) == list("aabb")
    assert order[4:6] == "cc"
    assert order.endswith("c")


def test_a_job_in_turns_that_fails_ends_the_others(tmp_path):
    runner = Counting(tmp_path)
    with pytest.raises(processes.BenchError, match="AssertionError"):
        runner.in_turns([[{"name": "a", "steps": 9}], [{"name": "x", "steps": 4}]])
    assert all(process.returncode is not None for process in runner.started)


def test_jobs_in_turns_end_with_the_benchmark(tmp_path):
    """Also those that have stopped, which no one would let go on again."""
    runner, before = Counting(tmp_path), signal.getsignal(signal.SIGTERM)

    def end_it():
        order = tmp_path / "order"
        while not order.is_file() or "b" not in order.read_text():
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=end_it, daemon=True).start()
    with pytest.raises(KeyboardInterrupt):
        runner.in_turns([[{"name": name, "steps": 9999}] for name in "ab"])
    assert runner.started
    assert all(process.returncode is not None for process in runner.started)
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_longer_run_is_reckoned_from_its_epochs():
    side = processes.Result(0.0, 12.0, 1, [(0.0, 5.0 + step, 0.5) for step in range(6)])
    assert parts._until(side, 12.0, 6, 2) == 12.0  # as measured
    # What comes after the last step is always there.
    assert parts._until(side, 12.0, 4, 2) == 8.0 + 2.0
    assert parts._until(side, 12.0, 8, 2) == 12.0 + 2.0


def test_of_an_even_number_of_rounds_neither_middle_one_is_chosen():
    assert tables.spread([0.9, 1.3]) == "1.10 (0.90 to 1.30)"
    assert tables.spread([2.0]) == "2.00"


def test_every_switch_is_made_of_settings_that_exist():
    for switch in SWITCHES.values():
        for side in (switch.off, switch.on):
            TrainConfig().replace(**switch.also, **side).validate()


def test_a_step_finds_its_picture_in_an_index_of_any_length(small):
    rows = small.ours("scaling", 1, sizes=[8, 20_000]).found["rows"]
    assert [row["pictures"] for row in rows] == [8, 20_000]
    assert rows[1]["step"] < 3 * rows[0]["step"]


@pytest.mark.parametrize("shape", ["sd15", "sdxl"])
def test_the_published_shapes_have_the_published_number_of_weights(shape, tmp_path):
    with torch.device("meta"):
        unet = modules(shape, tmp_path)["unet"]
    millions = sum(weight.numel() for weight in unet.parameters()) / 1e6
    assert millions == pytest.approx({"sd15": 859.5, "sdxl": 2567.5}[shape], abs=0.1)


def test_the_small_shape_is_the_one_that_was_measured_before(tmp_path):
    with torch.device("meta"):
        made = modules("small", tmp_path)
    counts = [sum(w.numel() for w in made[n].parameters()) / 1e6 for n in ("unet", "vae")]
    assert counts == [pytest.approx(17.84, abs=0.01), pytest.approx(3.88, abs=0.01)]


@pytest.mark.long
def test_the_gpu_tables_are_made_of_the_same_code_on_a_cpu(tmp_path):
    case, here = gpu.cases(["small:2"], "bf16"), torch.device("cpu")
    loops = [loop for loop in gpu.variants(()) if loop != "compiled"]  # by g++ it takes minutes
    rows = list(gpu.rows_of(case, loops, tmp_path, here, peak=0.1, seconds=0.0))
    assert [row["variant"] for row in rows][:2] == ["eager, peft, autocast", "ours"]
    assert {row["note"] for row in rows} == {""}
    assert all(row["rate"] > 0 for row in rows)
    part = {"rows": rows, "gpu": "a CPU", "peak": 0.1, "cap": "", "conditions": {"on": "x"}}
    assert "| a 17.8 M UNet | 2 | bf16 | ours |" in tables.page({"gpu": part}, {}, "bench", None)


def test_the_gpu_cases_are_those_that_are_named_in_their_order():
    assert gpu.cases(["sdxl:4", "sd15:1:no"], "bf16") == [
        gpu.Case("sdxl", 4, "bf16"), gpu.Case("sd15", 1, "no"),
    ]  # fmt: skip
    assert {case.shape for case in gpu.cases((), "bf16")} == {"sd15", "sdxl"}
    for word in ("sdxl", "sd9:1", "sdxl:x", "sdxl:1:int3"):
        with pytest.raises(ConfigError, match="no case"):
            gpu.cases([word], "bf16")
    with pytest.raises(ConfigError, match="no loop"):
        gpu.variants(["fast"])


def test_a_gpu_row_that_fails_says_why_and_the_next_one_is_measured(tmp_path):
    wanted, here = gpu.cases(["small:1"], "no"), torch.device("cpu")
    loops = ["ours", "int8"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(gpu.VARIANTS, "ours", ("ours", {"use_8bit_adam": True}))
        rows = list(gpu.rows_of(wanted, loops, tmp_path, here, peak=0.1, seconds=0.0))
    assert rows[0]["note"].startswith("ConfigError: use_8bit_adam needs")
    assert rows[1]["rate"] > 0


def test_predictions_are_marked_and_within_the_floor():
    shapes = [shape for shape in SHAPES.values() if shape.expected]
    assert "predictions, nothing measured" in tables.predictions(shapes)
    for shape in shapes:
        assert all(rate < 790 / shape.tflop for rate, _, _ in shape.expected.values())


def test_other_cards_get_the_measured_share_of_their_floor():
    shapes = [shape for shape in SHAPES.values() if shape.expected]
    row = {"shape": "SD 1.5", "batch": 4, "precision": "bf16", "variant": "ours", "of_peak": 0.2}
    row |= {"rate": 90.0, "memory": 15 * 2**30}
    rows = [row, row | {"variant": "eager, peft, autocast"}, row | {"rate": 0.0, "batch": 1}]
    text = tables.other_cards(shapes, {"gpu": "one", "rows": rows})
    # 0.2 x 65 / 1.718
    assert "| T4, 14.6 GiB | SD 1.5, batch 4, ours | 7.6 | 15.00 GiB | no |" in text
    assert "| A100, 39.4 GiB | SD 1.5, batch 4, ours | 36.3 | 15.00 GiB | yes |" in text
    assert text.count("SD 1.5, batch") == 2
    assert tables.other_cards(shapes, {"gpu": "one", "rows": rows[1:]}) == ""


def test_measuring_on_a_cpu_keeps_what_the_file_says_of_a_gpu(tmp_path):
    out, work = tmp_path / "B.md", tmp_path / "work"
    part = {"rows": [], "gpu": "one", "peak": 700.0, "cap": "", "conditions": {"on": "Monday"}}
    work.mkdir()
    (work / "gpu.json").write_text(json.dumps(part))
    command._write(command.Wanted(out=str(out)), work)
    measured = out.read_text()
    assert "## GPU: one" in measured
    (work / "gpu.json").unlink()
    command._write(command.Wanted(out=str(out)), work)
    of_gpu = measured[measured.index("## GPU: one") :]
    assert out.read_text().endswith(of_gpu)
    command._write(command.Wanted(out=str(tmp_path / "new.md")), work)
    assert "predictions, nothing measured" in (tmp_path / "new.md").read_text()


def test_the_command_refuses_what_it_does_not_know(small):
    wanted = command.Wanted(only=("speed",), work=str(small.folder))
    with pytest.raises(ConfigError, match="no part 'speed'"):
        command.run(wanted)
    with pytest.raises(ConfigError, match="diffusers checkout"):
        command.run(command.Wanted(reference=str(small.folder), work=str(small.folder)))


def test_a_process_that_fails_says_its_last_words(small):
    with pytest.raises(processes.BenchError, match="no_such_job"):
        processes.Runner(small.folder).run({"kind": "no_such_job"})


@pytest.mark.long
@pytest.mark.timeout(3000)
def test_the_whole_command_in_processes(small, tmp_path):
    """Every part, each side in processes of its own, at the size of the tests."""
    real = parts.Bench(small.folder, None, rounds=1, steps=4, parity_steps=6, pictures=8, side=16)
    real.check_parity()
    found = {name: part(real) | {"conditions": {"on": "x"}} for name, part in parts.PARTS.items()}
    text = tables.page(found, ABOUT, "bench", None)
    for title in ("A step", "Each switch", "A whole run", "Start-up", "Growth", "Forecast"):
        assert f"## {title}" in text
    print(text)


def test_gpu_rows_that_were_measured_apart_are_put_together_and_compared():
    def row(batch, variant, rate, **more):
        return {
            "shape": "SDXL",
            "batch": batch,
            "precision": "bf16",
            "variant": variant,
            "rate": rate,
        } | more

    rows = [
        row(4, "ours", 6.0, ratio=2.5), row(1, "ours, nf4", 3.0), row(4, "eager", 2.0), row(1, "eager", 2.0),
        row(1, "ours", 0.0),
    ]  # fmt: skip
    found = [(r["batch"], r["variant"], r.get("ratio")) for r in tables.compared(rows)]
    assert found == [
        (1, "eager", None), (1, "ours, nf4", 1.5), (1, "ours", None), (4, "eager", None), (4, "ours", 2.5),
    ]  # fmt: skip


def test_gpu_rows_older_than_the_newest_say_so():
    rows = [
        {"on": "Monday", "note": "small"},
        {"on": "Tuesday", "note": ""},
        {"on": "Monday", "note": ""},
    ]
    assert [row["note"] for row in tables._dated(rows)] == ["of Monday; small", "", "of Monday"]


def test_every_part_has_a_table_and_every_job_a_kind():
    assert set(parts.PARTS) | {"gpu", "gpu_capped"} == set(tables.SECTIONS)
    assert set(worker.KINDS) >= {"script", "plain", "command", "steady", "replay"}


STANDIN_PIXELS = """
import sys; sys.path.insert(0, sys.argv[1])
import numpy; from PIL import Image; from torchvision import transforms as t
side, wide = 16, Image.open(sys.argv[2])
steps = [t.Resize(side, interpolation=t.InterpolationMode.LANCZOS), t.CenterCrop(side)]
steps += [t.Lambda(lambda x: x), t.ToTensor(), t.Normalize([0.5], [0.5])]
numpy.save(sys.argv[3], t.Compose(steps)(wide).numpy())
"""


def test_the_stand_in_gives_our_pixels(tmp_path):
    from lora_nb import data
    from lora_nb.config import DataSpec

    random = np.random.default_rng(0).integers(0, 256, (20, 33, 3), dtype=np.uint8)
    picture, out = tmp_path / "wide.png", tmp_path / "pixels.npy"
    Image.fromarray(random).save(picture)
    words = [sys.executable, "-c", STANDIN_PIXELS, str(STANDIN), str(picture), str(out)]
    subprocess.run(words, check=True)
    spec = DataSpec(resolution=16, center_crop=True)
    ours = data.pixels(Image.open(picture), spec, 0, 0)
    assert np.abs(np.load(out) - ours.numpy()).max() < 1e-6


def test_pictures_are_a_function_of_the_seed(tmp_path):
    first, second = (ground.lay(tmp_path / name, 2, 16) for name in "ab")
    files = sorted(p.relative_to(first) for p in first.glob("pictures-*/*"))
    assert len(files) == 3
    assert all((first / f).read_bytes() == (second / f).read_bytes() for f in files)
