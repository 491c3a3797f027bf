"""What a learner sees and touches, in a real browser: the board while it trains, the interrupt button, the panel.

Each test leaves screenshots in runs/browser.
"""

import re
from pathlib import Path

import nbformat
import pytest

from lora_nb import env, run_folder

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
REPO = Path(__file__).resolve().parents[2]
STEPS = 24


def cells_of(notebook: str, *ids: str) -> list[str]:
    """The source of some cells of a course notebook."""
    cells = nbformat.read(REPO / "notebooks" / f"{notebook}.ipynb", as_version=4).cells
    sources = {cell.id: cell.source for cell in cells}
    return [sources[name] for name in ids]


def short_config(folder: Path, name: str):
    """The config that notebook 02 would leave, for a small number of short steps."""
    config = env.preset("tiny").config(
        name, max_train_steps=STEPS, train_batch_size=2, num_inference_steps=8, rank=4
    )
    config = config.replace(output_dir=str(folder / "runs" / name))
    run_folder.save_config(config)
    return config


def step_on_board(text: str, total: int = STEPS) -> int:
    """The step that a board or its last line names; 0 before there is one."""
    found = re.findall(rf"(\d+)\s*(?:/|of)\s*{total}\b", text)
    return int(found[-1]) if found else 0


def steps_done(folder: Path) -> list[int]:
    return [e["step"] for e in run_folder.read_history(folder) if e["event"] == "step"]


def test_board_moves_stops_goes_on_and_outlives_its_kernel(lab):
    """Notebook 03's own training cell: run, look, interrupt, run again, kill the kernel, run again."""
    config = short_config(lab.folder, "browser")
    folder = Path(config.output_dir)
    prepare = (
        "from lora_nb import train\n"
        "config = config.replace(validation_prompts=('umbrella, ink style', 'rocket, ink style'),"
        " num_validation_images=1, validation_steps=6, probe_steps=6, probe_size=8,"
        " checkpointing_steps=4)"
    )
    setup, parameters, read, train = cells_of(
        "03_training", "setup", "parameters", "config", "train"
    )
    parameters = parameters.replace('"ink"', '"browser"')
    lab.open("training.ipynb", [setup, parameters, read, prepare, train])
    cell = 4
    lab.run(0, 1, 2, 3)

    lab.start(cell)
    seen: list[int] = []
    figures: set[str] = set()

    def moved() -> bool:
        assert not lab.failed(cell), lab.text(cell)
        step = step_on_board(lab.text(cell))
        if step and step not in seen:
            seen.append(step)
        figures.update(lab.pictures_in(cell))
        return len(seen) >= 3 and len(figures) >= 2

    lab.until(moved, "three different steps and two different figures on the board")
    lab.show(cell, "1-board-while-it-trains")
    lab.interrupt()
    lab.until(lambda: not lab.running(cell), "the interrupted cell to end")
    assert not lab.failed(cell), lab.text(cell)
    stopped = max(steps_done(folder))
    assert seen == sorted(seen)
    assert stopped < STEPS
    assert "go on" in lab.text(cell)
    assert run_folder.read_history(folder)[-1]["event"] == "stop"
    lab.until(lambda: lab.finished_figure(cell), "the last figure of the interrupted board")
    lab.show(cell, "2-board-interrupted")

    lab.start(cell)
    lab.until(lambda: step_on_board(lab.text(cell)) > stopped, "a later step on the board")
    lab.until(lambda: max(steps_done(folder)) >= stopped + 5, "a checkpoint after it")
    lab.kill()
    killed_at = max(steps_done(folder))
    saved = max(int(path.name.split("-")[1]) for path in folder.glob("checkpoint-*"))
    assert stopped < saved <= killed_at < STEPS

    lab.run(0, 1, 2, 3)
    lab.start(cell)
    lab.until(lambda: step_on_board(lab.text(cell)), "a board after the kernel died")
    first = step_on_board(lab.text(cell))
    lab.until(lambda: lab.pictures_in(cell), "its figure")
    lab.show(cell, "3-board-after-sigkill")
    lab.until(lambda: not lab.running(cell), "the training to end")
    assert first > saved
    assert not lab.failed(cell), lab.text(cell)
    events = run_folder.read_history(folder)
    assert [e["step"] for e in events if e["event"] == "resume"][-1] == saved
    assert steps_done(folder) == list(range(1, STEPS + 1))
    assert step_on_board(lab.text(cell)) == STEPS
    lab.until(lambda: lab.finished_figure(cell), "the last figure of the finished board")
    lab.show(cell, "4-board-finished")


@pytest.fixture
def panel(lab):
    """A notebook with notebook 02's panel on the page; its second cell says what config() holds."""
    (show,) = cells_of("02_lora_config", "panel")
    load = (
        "import lora_nb\nRUN = 'panel'\npreset = lora_nb.preset('tiny')\n"
        "family = lora_nb.load_family(preset.family, preset.model)"
    )
    tell = "spec = panel.config().lora['unet']; print(spec.rank, spec.alpha)"
    lab.open("panel.ipynb", [load, show, tell])
    lab.run(0, 1)
    return lab


def slider(lab, cell: int, label: str):
    """The row of a slider, by the label beside it."""
    page = lab.page
    rows = lab.output(cell).locator(".widget-hslider, .widget-slider")
    return rows.filter(has=page.get_by_text(label, exact=True)).first


def test_rank_slider_moves_by_keyboard_mouse_and_readout(panel):
    """Each way of moving it changes the read-outs at once, and the config that the next cell gets."""
    lab, rank = panel, slider(panel, 1, "rank")
    rank.scroll_into_view_if_needed()
    handle, readout = rank.locator(".noUi-handle"), rank.locator(".widget-readout")
    alpha = slider(panel, 1, "alpha").locator(".widget-readout")

    def numbers() -> str:
        return lab.output(1).locator(".widget-html").all_inner_texts().__str__()

    def told() -> tuple[int, float]:
        # The page sends one change at a time; alpha's slider is moved from the kernel's side, after rank's has arrived.
        lab.until(
            lambda: float(alpha.inner_text()) == float(readout.inner_text()),
            "alpha to follow rank",
        )
        lab.run(2)
        lab.until(lambda: len(lab.text(2).split()) == 2, "the cell's output to be drawn")
        first, second = lab.text(2).split()
        return int(first), float(second)

    before = numbers()
    assert readout.inner_text() == "8"
    lab.show(1, "5-panel")

    handle.click()
    for _ in range(3):
        lab.page.keyboard.press("ArrowRight")
    lab.until(lambda: readout.inner_text() == "11", "the keyboard to move the slider")
    lab.until(lambda: numbers() != before, "the read-outs to follow the keyboard")
    assert told() == (11, 11.0)

    before = numbers()
    bar = rank.locator(".noUi-target").bounding_box()
    lab.page.mouse.click(bar["x"] + 0.5 * bar["width"], bar["y"] + bar["height"] / 2)
    lab.until(lambda: int(readout.inner_text()) > 25, "the mouse to move the slider")
    lab.until(lambda: numbers() != before, "the read-outs to follow the mouse")
    assert told()[0] == int(readout.inner_text())

    before = numbers()
    readout.click()
    lab.page.keyboard.press("ControlOrMeta+a")
    lab.page.keyboard.type("16")
    lab.page.keyboard.press("Enter")
    lab.until(lambda: numbers() != before, "the read-outs to follow what was typed")
    assert told() == (16, 16.0)
    lab.show(1, "6-panel-after-moving")


def test_background_buttons_start_pause_go_on_and_stop(lab):
    """The notebook stays free while it trains; each button does what it says, and the files say the same."""
    config = short_config(lab.folder, "background").replace(
        validation_prompts=("umbrella, ink style",), num_validation_images=1, validation_steps=50
    )
    config = config.replace(max_train_steps=400)
    folder = Path(config.output_dir)
    run_folder.save_config(config)
    begin = (
        "from lora_nb import read_config, run_dir, run_in_background\n"
        "run = run_in_background(read_config(run_dir('background')))"
    )
    lab.open("background.ipynb", [begin, "print(6 * 7)", "print(run.state, run.training.done)"])
    lab.run(0)
    cell = 0

    def press(name: str) -> None:
        button = lab.output(cell).locator("button.jupyter-button", has_text=re.compile(f"^{name}$"))
        lab.until(button.is_enabled, f"the button {name} to be enabled")
        button.click()

    def events() -> list[str]:
        return [event["event"] for event in run_folder.read_history(folder)]

    def last_step() -> int:
        return max([0, *steps_done(folder)])

    press("Start")
    lab.until(lambda: step_on_board(lab.text(cell), 400) > 1, "the board to move")
    lab.run(1)  # the kernel is free
    assert lab.text(1).strip() == "42"
    lab.show(cell, "7-background-running")

    press("Pause")
    lab.until(lambda: "paused" in lab.text(cell), "the board to say that it waits")
    at = last_step()
    assert events()[-1] == "pause"
    assert (folder / f"checkpoint-{at}" / "MANIFEST.json").is_file()
    lab.page.wait_for_timeout(1500)
    assert last_step() == at
    lab.run(2)
    assert lab.text(2).split() == ["paused", str(at)]
    lab.show(cell, "8-background-paused")

    press("Go on")
    lab.until(lambda: last_step() > at, "steps after the pause")
    lab.until(lambda: step_on_board(lab.text(cell), 400) > at, "the board to move on")
    press("Stop")
    lab.until(lambda: "stopped" in lab.text(cell), "the board to say that it has stopped")
    at = last_step()
    assert (folder / "pytorch_lora_weights.safetensors").is_file()
    assert events()[-1] == "stop"
    lab.until(lambda: lab.finished_figure(cell), "the last figure of the stopped board")
    assert "press Start, or run the cell again, to go on" in lab.text(cell)
    lab.show(cell, "9-background-stopped")

    press("Start")
    lab.until(lambda: last_step() > at, "steps of the second start")
    press("Stop")
    lab.until(lambda: events()[-1] == "stop", "the second stop")
    assert steps_done(folder) == list(range(1, last_step() + 1))
