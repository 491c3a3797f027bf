"""Every family from the command line to a public pipeline: train, save, load with diffusers alone, kill and go on."""

import json
import subprocess
import sys
from pathlib import Path
from typing import get_type_hints

import diffusers
import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file
from test_families import LOADERS, SIDES

from lora_nb import adapters, checkpoint, run_folder
from lora_nb.cli import main
from lora_nb.families import REGISTRY, tiny
from lora_nb.formats import FILE_NAME, KOHYA_FILE, inspect
from lora_nb.trainer import train

# Written down here, not read from the registry, so that a family which is lost there is missed.
FAMILIES = (
    *("sd", "sdxl", "sd3", "flux", "z_image"),
    *("kandinsky_decoder", "kandinsky_prior", "wuerstchen"),
)
FLAGS = (
    "--resolution 16 --random_flip --train_batch_size 2 --seed 1 --max_train_steps 20 --learning_rate 1e-2 "
    "--lr_scheduler cosine --lr_warmup_steps 2 --checkpointing_steps 7 --log_every 1"
).split()
# Runs `python -m lora_nb` once for each list of arguments, in a process of its own that is killed after step 9.
# Forked after the imports, which take most of the time.
KILL_EACH = """
import json, os, runpy, signal, sys
import lora_nb.cli, lora_nb.inference, lora_nb.report, lora_nb.trainer

class Deadly:
    def write(self, text):
        if text.startswith("step 9/"):
            os.kill(os.getpid(), signal.SIGKILL)
    def flush(self):
        pass

for arguments in json.load(sys.stdin):
    if (child := os.fork()) == 0:
        sys.argv[1:], sys.stdout = arguments, Deadly()
        runpy.run_module("lora_nb", run_name="__main__")
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.fixture(autouse=True)
def _few_latents(monkeypatch):
    """Certificates are made of 4 x 4 latents, not 24 x 24, whose attention takes most of the time here."""
    monkeypatch.setattr(REGISTRY["wuerstchen"], "resolution", SIDES["wuerstchen"])


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    return {name: tiny.build(name, tmp_path_factory.mktemp(name)) for name in FAMILIES}


@pytest.fixture(scope="module")
def command(models, pictures, tmp_path_factory):
    """The arguments of a run of 20 steps by family and name; the family itself is not told."""
    runs = tmp_path_factory.mktemp("runs")

    def arguments(name: str, run: str) -> list[str]:
        paths = {
            "--pretrained_model_name_or_path": models[name],
            "--train_data_dir": pictures,
            "--output_dir": runs / f"{name}-{run}",
        }
        return ["train", *(str(word) for pair in paths.items() for word in pair), *FLAGS]

    return arguments


@pytest.fixture(scope="module")
def killed(command) -> dict[str, int]:
    """How the processes ended that were killed in each family's run `killed`."""
    lists = json.dumps([command(name, "killed") for name in FAMILIES])
    done = subprocess.run(
        [sys.executable, "-c", KILL_EACH], input=lists, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return dict(zip(FAMILIES, map(int, done.stdout.split()), strict=True))


def folder_of(arguments: list[str]) -> Path:
    return Path(arguments[arguments.index("--output_dir") + 1])


def public_pipeline(name: str, folder: Path) -> DiffusionPipeline:
    """The model as diffusers alone reads it; of two-stage models the combined pipeline."""
    if name in ("kandinsky_decoder", "kandinsky_prior"):
        kinds = (
            "KandinskyV22PriorPipeline",
            "KandinskyV22Pipeline",
            "KandinskyV22CombinedPipeline",
        )
    elif name == "wuerstchen":
        kinds = (
            "WuerstchenPriorPipeline",
            "WuerstchenDecoderPipeline",
            "WuerstchenCombinedPipeline",
        )
    else:
        return DiffusionPipeline.from_pretrained(folder)
    other = "prior" if name == "kandinsky_decoder" else "decoder"
    first, second, both = (getattr(diffusers, kind) for kind in kinds)
    places = (folder / other, folder) if other == "prior" else (folder, folder / other)
    first, second = (_read(*stage) for stage in zip((first, second), places, strict=True))
    named = {f"prior_{part}": module for part, module in first.components.items()}
    return both(**second.components, **named)


def _read(kind: type, folder: Path) -> DiffusionPipeline:
    """One stage; where diffusers no longer finds its own classes by the index, from its parts."""
    if "Wuerstchen" not in kind.__name__:
        return kind.from_pretrained(folder)
    classes = get_type_hints(kind.__init__).items()
    return kind(
        **{
            part: cls.from_pretrained(folder, subfolder=part)
            for part, cls in classes
            if hasattr(cls, "from_pretrained")
        }
    )


def draw(name: str, pipeline: DiffusionPipeline) -> torch.Tensor:
    pipeline.set_progress_bar_config(disable=True)
    side = SIDES.get(name, 16)
    settings = {"num_inference_steps": 3, "output_type": "pt", "height": side, "width": side}
    generator = torch.Generator().manual_seed(0)
    return pipeline(prompt="colour 3", generator=generator, **settings).images


@pytest.mark.parametrize("name", FAMILIES)
def test_from_the_command_line_to_a_public_pipeline(name, models, command):
    arguments = command(name, "straight")
    assert main(arguments) == 0
    folder = folder_of(arguments)
    start = run_folder.read_history(folder)[0]
    assert (start["family"], start["max_train_steps"]) == (name, 20)  # read from the index
    names = {path.name for path in folder.iterdir()}
    assert names >= {FILE_NAME, "README.md", "checkpoint-7", "checkpoint-14", "checkpoint-20"}
    fresh = public_pipeline(name, models[name])
    base = draw(name, fresh)
    load = LOADERS.get(name, lambda pipe: pipe.load_lora_weights)(fresh)
    load(str(folder), weight_name=FILE_NAME)
    loaded = draw(name, fresh)
    with pytest.warns(UserWarning, match="already finished at step 20"):
        trained = train(run_folder.read_config(folder))
    torch.testing.assert_close(loaded, draw(name, trained.family.pipeline()), atol=1e-4, rtol=0)
    assert not torch.allclose(loaded, base, atol=1e-3)
    adapters.remove(trained.family)
    torch.testing.assert_close(base, draw(name, trained.family.pipeline()), atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", FAMILIES)
def test_killed_and_resumed_equals_uninterrupted(name, command, killed):
    assert killed[name] == -9
    straight, resumed = (folder_of(command(name, run)) for run in ("straight", "killed"))
    assert [path.name for path in checkpoint.found(resumed)] == ["checkpoint-7"]
    assert not (resumed / FILE_NAME).exists()
    if not (straight / FILE_NAME).exists():  # this test alone was asked for
        assert main(command(name, "straight")) == 0
    assert main(command(name, "killed")) == 0
    events = [e for e in run_folder.read_history(resumed) if e["event"] in ("start", "resume")]
    assert [e["step"] for e in events] == [0, 7]
    a, b = (checkpoint.read(folder / "checkpoint-20").tensors for folder in (straight, resumed))
    assert a.keys() == b.keys()
    assert all(torch.equal(a[key], b[key]) for key in a)
    a, b = (load_file(folder / FILE_NAME) for folder in (straight, resumed))
    assert a.keys() == b.keys()
    assert all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("name", ["sd", "sdxl"])
def test_dreambooth_from_the_command_line(name, models, pictures, tmp_path, capsys):
    """The DreamBooth scripts' flags: class pictures, prior preservation, all text encoders at a rate of their own."""
    settings = {
        "--pretrained_model_name_or_path": models[name],
        "--instance_data_dir": pictures,
        "--class_data_dir": tmp_path / "class",
        "--output_dir": tmp_path / "run",
        "--instance_prompt": "a sks fox",
        "--class_prompt": "a fox",
        "--num_class_images": 3,
        "--num_inference_steps": 2,
        "--text_encoder_lr": 1e-3,
        "--snr_gamma": 5.0,
    }
    words = [str(word) for pair in settings.items() for word in pair]
    words += ["--with_prior_preservation", "--train_text_encoder", "--output_kohya_format", *FLAGS]
    assert main(["train", *words]) == 0
    printed = capsys.readouterr().out
    assert "Drew 3 pictures of 'a fox'" in printed
    assert f"{KOHYA_FILE}: kohya fp32" in printed
    assert "round trip holds" in printed
    assert "kohya" in inspect(tmp_path / "run" / KOHYA_FILE).format
    assert len(list((tmp_path / "class").glob("*.png"))) == 3
    texts = ["text_encoder", "text_encoder_2"][: 2 if name == "sdxl" else 1]
    steps = [e for e in run_folder.read_history(tmp_path / "run") if e["event"] == "step"]
    assert list(steps[2]["lr"]) == ["unet", *texts]
    assert [steps[2]["lr"][part] / steps[2]["lr"]["unet"] for part in texts] == [0.1] * len(texts)
    assert len(steps[0]["per_image"]) == 4  # two of the subject, two of the class
    parts = {key.split(".")[0] for key in load_file(tmp_path / "run" / FILE_NAME)}
    assert parts == {"unet", *texts}
