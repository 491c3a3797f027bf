"""The command line: help, exit codes, one sentence for wrong input, and a small run from end to end."""

import json
import signal
import subprocess
import sys

import pytest
from PIL import Image

from lora_nb.cli import main
from lora_nb.config import TrainConfig

SMALL = ["--resolution", "16", "--train_batch_size", "2", "--seed", "1", "--log_every", "1"]


def run(*words: object, **options: object) -> subprocess.CompletedProcess:
    """`python -m lora_nb ...` in a process of its own."""
    command = [sys.executable, "-m", "lora_nb", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, **options)


@pytest.fixture
def train(tiny_sd, pictures, tmp_path):
    """Train on the tiny base in this process; returns the exit code."""

    def call(*words: object, data: object = pictures, model: object = tiny_sd) -> int:
        line = [
            "train",
            "--pretrained_model_name_or_path",
            model,
            "--train_data_dir",
            data,
            *SMALL,
            *words,
        ]
        return main([str(word) for word in line])

    return call


@pytest.fixture
def folder(tmp_path):
    """Two good pictures with captions, to be spoiled."""
    place = tmp_path / "mine"
    place.mkdir()
    for name in ("a", "b"):
        Image.new("RGB", (64, 64), "orange").save(place / f"{name}.png")
        (place / f"{name}.txt").write_text("an orange square")
    return place


def refused(code: int, capsys: pytest.CaptureFixture, *words: str) -> None:
    """Exit code 2 and one sentence on standard error with these words."""
    captured = capsys.readouterr()
    assert code == 2
    lines = captured.err.strip().splitlines()
    assert len(lines) == 1, captured.err
    assert lines[0].startswith("error: ")
    assert lines[0].endswith((".", "?"))
    for word in words:
        assert word in lines[0]


@pytest.mark.parametrize("command", [[], ["train"], ["doctor"], ["generate"], ["inspect"]])
def test_help_is_readable(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([*command, "--help"])
    assert stop.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 120
    assert not command or any(line.endswith("options:") for line in lines)


def test_train_help_has_every_setting_in_a_group(capsys):
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    text = capsys.readouterr().out
    for group in ("adapters:", "data:", "training:"):
        assert f"\n{group}\n" in text
    for name in TrainConfig.__dataclass_fields__:
        assert f"--{name}" in text or name in ("lora", "data")
    for flag in ("--rank N", "--train_text_encoder", "--caption_column"):
        assert flag in text


# Wrong input


def test_missing_folder(train, tmp_path, capsys):
    refused(train(data=tmp_path / "nowhere"), capsys, "nowhere")


def test_empty_folder(train, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    refused(train(data=tmp_path / "empty"), capsys, "empty")


def test_unreadable_picture(train, folder, capsys):
    (folder / "b.png").write_bytes(b"not a picture")
    refused(train(data=folder), capsys, "b.png")


def test_missing_caption(train, folder, capsys):
    (folder / "b.txt").unlink()
    refused(train(data=folder), capsys, "b.png", "caption")


def test_unknown_key_of_a_config_file(train, tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps({"learning_rat": 1e-3}))
    refused(
        train("--config", tmp_path / "config.json"),
        capsys,
        "learning_rat",
        "did you mean 'learning_rate'",
    )


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--rank", "0"], ["rank", "0", "at least 1"]),
        (["--ranks", "4"], ["--ranks", "did you mean --rank?"]),
        (["--learning-rate=1"], ["--learning-rate", "did you mean --learning_rate?"]),
        (["--rank", "four"], ["--rank", "four"]),
        (["--lr_scheduler", "sine"], ["sine", "cosine"]),
        (["--resolution", "17"], ["resolution", "17"]),
        (["--config", "/nowhere.json"], ["/nowhere.json"]),
        (["stray"], ["argument stray"]),
    ],
)
def test_wrong_setting(train, capsys, flags, words):
    refused(train(*flags), capsys, *words)


def test_wrong_model_folder(train, folder, capsys):
    refused(train(model=folder), capsys, str(folder), "model_index.json")
    refused(train(model="/nowhere"), capsys, "/nowhere")


def test_no_command_and_a_wrong_one(capsys):
    refused(main([]), capsys, "COMMAND")
    refused(main(["trian"]), capsys, "trian", "train")


def test_generate_and_inspect_refuse_what_is_no_lora(tiny_sd, tmp_path, capsys):
    (tmp_path / "x.safetensors").write_bytes(b"\x80\x04 a pickle")
    for file in (tmp_path / "none.safetensors", tmp_path / "x.safetensors"):
        refused(main(["inspect", str(file)]), capsys, file.name)
        refused(
            main(["generate", "a cat", "--model", str(tiny_sd), "--lora", str(file)]),
            capsys,
            file.name,
        )


def test_no_traceback_in_a_process_of_its_own(tmp_path):
    done = run("train", "--train_data_dir", tmp_path / "nowhere", "--max_train_steps", 1)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert len(done.stderr.strip().splitlines()) == 1
    assert "the embedded one is used" in done.stdout


# A run


@pytest.fixture(scope="module")
def trained(tiny_sd, pictures, tmp_path_factory):
    """The folder of a run of three steps, and what it printed."""
    folder = tmp_path_factory.mktemp("cli") / "run"
    done = run(
        "train", "--pretrained_model_name_or_path", tiny_sd, "--train_data_dir", pictures, *SMALL,
        "--max_train_steps", 3, "--output_dir", folder, "--validation_prompts", "colour 1", "--num_inference_steps", 2,
        "--validation_steps", 2, "--checkpointing_steps", 2, "--num_validation_images", 1, "--train_text_encoder",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


def test_train_writes_the_run_layout(trained):
    folder, _ = trained
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert names >= {
        "config.json",
        "history.jsonl",
        "pytorch_lora_weights.safetensors",
        "README.md",
        "report.html",
        "samples/base-p0-s0.png",
        "samples/step-000002-p0-s0.png",
        "samples/step-000003-p0-s0.png",
        *(
            f"checkpoint-{k}/{name}"
            for k in (2, 3)
            for name in ("state.safetensors", "meta.json", "MANIFEST.json")
        ),
    }
    assert not [name for name in names if name.endswith((".tmp", ".pkl", ".bin", ".pt"))]


def test_train_prints_a_line_per_step(trained):
    folder, printed = trained
    steps = [line for line in printed.splitlines() if line.startswith("step ")]
    assert [line.split()[1] for line in steps] == ["1/3", "2/3", "3/3"]
    assert all("loss 0." in line or "loss 1." in line for line in steps)
    assert "probe" in steps[-1]
    assert str(folder) in printed.splitlines()[-1]


def test_config_of_a_run_is_a_config_file(trained, tmp_path, capsys):
    folder, _ = trained
    line = [
        "train",
        "--config",
        folder / "config.json",
        "--output_dir",
        tmp_path,
        "--max_train_steps",
        1,
    ]
    assert main([str(word) for word in line]) == 0
    assert TrainConfig.from_json((tmp_path / "config.json").read_text()).lora.keys() == {
        "unet",
        "text_encoders",
    }


def test_inspect(trained, capsys):
    assert main(["inspect", str(trained[0])]) == 0
    printed = capsys.readouterr().out
    assert "unet" in printed
    assert "text_encoder" in printed


def test_generate_draws_what_the_scale_says(trained, tiny_sd, tmp_path, capsys):
    def draw(name: str, *words: object) -> list[bytes]:
        line = [
            "generate",
            "colour 1",
            "colour 2",
            "--model",
            tiny_sd,
            "--seeds",
            0,
            7,
            "--num_inference_steps",
            2,
        ]
        assert main([str(word) for word in [*line, "--output_dir", tmp_path / name, *words]]) == 0
        files = capsys.readouterr().out.split()
        assert [file.rsplit("/", 1)[1] for file in files] == [
            "p0-s0.png",
            "p0-s7.png",
            "p1-s0.png",
            "p1-s7.png",
        ]
        return [Image.open(file).tobytes() for file in files]

    base = draw("base")
    assert len(set(base)) == 4
    assert draw("off", "--lora", trained[0], "--scale", 0) == base
    assert draw("strong", "--lora", trained[0], "--scale", 200) != base


def test_doctor(pictures, folder, capsys):
    assert main(["doctor", str(pictures)]) == 0
    printed = capsys.readouterr().out
    assert "torch" in printed
    assert "8 pictures" in printed
    (folder / "b.txt").unlink()
    assert main(["doctor", str(folder)]) == 2
    assert "b.png" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_leaves_a_checkpoint_to_go_on_from(
    tiny_sd, pictures, tmp_path, number, code, capsys
):
    command = [sys.executable, "-m", "lora_nb", "train", "--pretrained_model_name_or_path", tiny_sd, "--train_data_dir",
               pictures, *SMALL, "--max_train_steps", "100000", "--output_dir", tmp_path]  # fmt: skip
    started = subprocess.Popen(
        list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    for line in started.stdout:
        if line.startswith("step 2/"):
            started.send_signal(number)
            break
    rest, errors = started.communicate(timeout=120)
    assert started.returncode == code, errors
    assert "Traceback" not in errors
    stopped = int(rest.splitlines()[-1].split("Stopped at step ")[1].split(";")[0])
    assert (tmp_path / f"checkpoint-{stopped}" / "MANIFEST.json").is_file()
    command[command.index("100000")] = str(stopped + 1)
    assert main([str(word) for word in command[3:]]) == 0
    steps = [
        line.split()[1] for line in capsys.readouterr().out.splitlines() if line.startswith("step ")
    ]
    assert steps == [f"{stopped + 1}/{stopped + 1}"]
