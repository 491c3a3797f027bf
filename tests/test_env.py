"""Where we run: platform, device and its reason, folders, presets, doctor, and how quick the import is."""

import dataclasses
import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import lora_nb
from lora_nb import env
from lora_nb.errors import ConfigError, ModelError
from lora_nb.families import REGISTRY

# What torch 2.11 for CUDA 12.8 was built for, as `torch.cuda.get_arch_list()` gives it.
CU128 = ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120"]
P100, T4, A100, L4, H100, FUTURE = (6, 0), (7, 5), (8, 0), (8, 9), (9, 0), (13, 0)


@pytest.fixture
def elsewhere(monkeypatch):
    """No variable of any platform is set."""
    for name in (
        "COLAB_RELEASE_TAG",
        "KAGGLE_KERNEL_RUN_TYPE",
        "CI",
        "LORA_NB_HEADLESS",
        "LORA_NB_RUNS",
        "LORA_NB_DATA",
        "LORA_NB_KEEP",
        "LORA_NB_SESSION_HOURS",
    ):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


@pytest.fixture
def gpu(monkeypatch):
    """Pretend that torch sees a GPU: the one thing a machine without one cannot show."""

    def pretend(name: str, capability: tuple[int, int], gigabytes: float) -> None:
        properties = type("Properties", (), {"total_memory": int(gigabytes * 2**30)})
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: name)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
        monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: CU128)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)

    return pretend


def test_where(elsewhere):
    assert env.where() == "local"
    elsewhere.setenv("KAGGLE_KERNEL_RUN_TYPE", "Interactive")
    assert env.where() == "kaggle"
    elsewhere.setenv("COLAB_RELEASE_TAG", "release-colab-2026.08")
    assert env.where() == "colab"


def test_headless(elsewhere):
    assert env.headless()  # pytest has no notebook kernel
    from IPython import get_ipython

    kernel = type("Shell", (), {"kernel": None})()
    elsewhere.setattr(sys.modules["IPython"], "get_ipython", lambda: kernel)
    assert not env.headless()
    for name, value in (
        ("LORA_NB_HEADLESS", "1"),
        ("CI", "true"),
        ("KAGGLE_KERNEL_RUN_TYPE", "Batch"),
    ):
        elsewhere.setenv(name, value)
        assert env.headless()
        elsewhere.delenv(name)
    assert get_ipython() is None


@pytest.mark.parametrize(
    ("capability", "architectures", "runs"),
    [
        (P100, CU128, False),
        (T4, CU128, True),
        (L4, CU128, True),  # sm_89 is not in the list; code for sm_86 runs on it
        (A100, ["sm_86", "sm_90"], False),
        (H100, ["sm_90a"], False),
        (FUTURE, CU128, False),
        (FUTURE, [*CU128, "compute_120"], True),
        (P100, ["compute_75"], False),
    ],
)
def test_kernels_for_a_gpu(capability, architectures, runs):
    assert env.hardware._runs_on(capability, architectures) is runs


@pytest.mark.parametrize(
    ("name", "capability", "device", "dtype", "words"),
    [
        ("Tesla T4", T4, "cuda", "float16", "sm_75"),
        ("NVIDIA L4", L4, "cuda", "bfloat16", "sm_89"),
        ("Tesla P100", P100, "cpu", "float32", "no kernels for Tesla P100"),
    ],
)
def test_device_has_a_true_reason(gpu, name, capability, device, dtype, words):
    gpu(name, capability, 16)
    found = env.pick_device()
    assert (found.name, found.dtype) == (device, dtype)
    assert words in found.reason
    stranded = next(check for check in env.doctor() if check.name == "device")
    assert stranded.ok is (device == "cuda")


def test_folders(elsewhere, tmp_path):
    (tmp_path / "chosen" / "base").mkdir(parents=True)
    elsewhere.setenv("LORA_NB_DATA", str(tmp_path / "chosen"))
    with pytest.raises(ModelError, match="LORA_NB_DATA"):
        env.data_dir()
    (tmp_path / "chosen" / "base" / "model_index.json").write_text("{}")
    assert env.data_dir() == tmp_path / "chosen"
    assert env.runs_dir() == Path(env.__file__).resolve().parents[2] / "runs"
    elsewhere.setenv("KAGGLE_KERNEL_RUN_TYPE", "Batch")
    assert env.runs_dir() == Path("/kaggle/working/runs")
    elsewhere.setenv("LORA_NB_RUNS", str(tmp_path))
    assert env.run_dir("my-style") == tmp_path / "my-style"


@pytest.mark.parametrize("name", ["", "a/b", "..", "/tmp/x"])
def test_a_run_is_one_folder(name):
    with pytest.raises(ConfigError, match="one folder name"):
        env.run_dir(name)


def test_need_names_the_notebook(tmp_path):
    assert env.need(tmp_path, "03_training.ipynb") == tmp_path
    with pytest.raises(ConfigError, match=r"^There is no .*adapter.* run 03_training.ipynb first"):
        env.need(tmp_path / "adapter", "03_training.ipynb")


def test_auto_without_a_gpu_is_the_embedded_base(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    chosen = env.preset("auto")
    assert chosen.name == "tiny"
    assert "no usable CUDA GPU" in chosen.reason


@pytest.mark.parametrize(
    ("gigabytes", "reachable", "name", "words"),
    [(15, True, "sd15", "15 GB"), (15, False, "tiny", "cache"), (4, True, "tiny", "wants 8")],
)
def test_auto_with_a_gpu(gpu, monkeypatch, gigabytes, reachable, name, words):
    gpu("Tesla T4", T4, gigabytes)
    monkeypatch.setattr(env.presets, "_reachable", lambda model: reachable)
    chosen = env.preset()
    assert chosen.name == name
    assert words in chosen.reason


def test_offline_nothing_is_reachable():
    assert not env.presets._reachable("nobody/nothing")


def test_preset_becomes_a_config():
    chosen = env.preset("tiny")
    config = chosen.config(
        "mine", rank=16, max_train_steps=None, caption_dropout=0.1, learning_rate=3e-4
    )
    assert config.lora["unet"].rank == 16
    assert config.max_train_steps == chosen.max_train_steps  # None keeps the preset's
    assert config.data.caption_dropout == 0.1
    assert config.learning_rate == 3e-4
    assert config.lora["unet"].learning_rate is None
    assert config.output_dir == str(env.run_dir("mine"))
    assert Path(config.data.train_data_dir, "train").is_dir()
    other = chosen.config("mine", dataset_name="somebody/pictures")
    assert (other.data.train_data_dir, other.data.dataset_name) == (None, "somebody/pictures")


def test_preset_refuses_what_it_does_not_know():
    with pytest.raises(ConfigError, match="did you mean 'rank'"):
        env.preset("tiny").config("mine", rnak=8)
    with pytest.raises(ConfigError, match="rank of unet is 0"):
        env.preset("tiny").config("mine", rank=0)
    with pytest.raises(ConfigError, match="tiny, sd15"):
        env.preset("huge")


@pytest.mark.parametrize("name", env.PRESETS)
def test_every_preset_gives_a_valid_config(name):
    env.preset(name).config("mine")


def test_there_is_a_preset_for_each_family():
    assert {env.preset(name).family for name in env.PRESETS} == set(REGISTRY)


@pytest.mark.parametrize(
    ("name", "resolution", "steps", "guidance", "decay"),
    [
        ("sdxl", 1024, 30, 5.0, 1e-2),
        ("sd3", 1024, 40, 4.5, 1e-4),
        ("flux", 512, 28, 3.5, 1e-4),
        ("z_image", 1024, 50, 5.0, 1e-4),
        ("kandinsky_decoder", 512, 30, 4.0, 0.0),
        ("wuerstchen", 768, 12, 4.0, 0.0),
    ],
)
def test_presets_of_large_models(gpu, name, resolution, steps, guidance, decay):
    gpu("NVIDIA L4", L4, 24)
    config = env.preset(name).config("mine")
    assert (config.family, config.mixed_precision, config.gradient_checkpointing) == (
        name,
        "bf16",
        True,
    )
    assert (config.data.resolution, config.train_batch_size) == (resolution, 1)
    assert (config.num_inference_steps, config.guidance_scale) == (steps, guidance)
    assert (config.learning_rate, config.adam_weight_decay) == (1e-4, decay)


def test_setup_prints_what_it_returns(capsys):
    found = lora_nb.setup()
    assert capsys.readouterr().out.strip() == found.table()
    for words in (found.device.reason, str(found.runs), found.preset.name, "torch"):
        assert words in found.table()
    assert "all checks passed" in repr(found)


@pytest.mark.parametrize(("version", "ok"), [("0.10.0", False), ("0.16.0", True)])
def test_old_torchao_is_reported(monkeypatch, version, ok):
    real = importlib.metadata.version
    monkeypatch.setattr(
        importlib.metadata, "version", lambda name: version if name == "torchao" else real(name)
    )
    check = next(check for check in env.doctor() if check.name == "torchao")
    assert check.ok is ok
    assert "uninstall" in check.fix


def test_versions_outside_the_window_are_reported():
    assert env.checkup._version("numpy", "1.0", "99.0").ok
    assert "newer than tested" in env.checkup._version("numpy", "1.0", "1.26").found
    assert env.checkup._version("numpy", "99.0", "99.1").fix == 'pip install "numpy>=99.0"'
    assert env.checkup._version("no-such-package", "1.0", "2.0").found == "not installed"


def test_import_is_quick_and_light():
    heavy = "torch diffusers transformers datasets matplotlib ipywidgets"
    code = (
        "import sys, time; start = time.process_time(); import lora_nb, lora_nb.env; "
        "print(time.process_time() - start); "
        f"print([name for name in '{heavy}'.split() if name in sys.modules])"
    )
    runs = [
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        ).stdout.split("\n")
        for _ in range(3)
    ]
    assert runs[0][1] == "[]"
    assert min(float(seconds) for seconds, *_ in runs) < 0.3


@pytest.mark.parametrize("name", lora_nb.__all__)
def test_public_names_are_there(name):
    assert getattr(lora_nb, name) is not None
    assert name in dir(lora_nb)


def test_unknown_names_are_refused():
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        lora_nb.trian  # noqa: B018


def test_show_source(capsys):
    lora_nb.show_source(env.run_dir)
    lines = capsys.readouterr().out.splitlines()
    number = int(lines[0].removeprefix("# lora_nb/env/folders.py, line "))
    assert (
        Path(env.folders.__file__).read_text().splitlines()[number - 1]
        == lines[1]
        == "def run_dir(name: str) -> Path:"
    )
    lora_nb.show_source(dataclasses.dataclass(env.Preset))
    assert "class Preset" in capsys.readouterr().out


# Colab and Kaggle


@pytest.fixture
def secrets(elsewhere):
    """Kaggle's secret store with one secret, as its module gives it."""
    import types

    class UserSecretsClient:
        def get_secret(self, label):
            return {"HF_TOKEN": "hf_" + 30 * "x"}[label]

    store = types.ModuleType("kaggle_secrets")
    store.UserSecretsClient = UserSecretsClient
    elsewhere.setitem(sys.modules, "kaggle_secrets", store)
    elsewhere.delenv("HF_TOKEN", raising=False)
    return store


def test_kaggles_token_is_handed_over_and_never_shown(secrets, elsewhere, capsys):
    elsewhere.setenv("HF_TOKEN", "")  # so that it is put back afterwards
    elsewhere.delenv("HF_TOKEN")
    elsewhere.setenv("KAGGLE_KERNEL_RUN_TYPE", "Batch")
    found = lora_nb.setup()
    assert os.environ["HF_TOKEN"].startswith("hf_")
    shown = capsys.readouterr()
    assert "hf_" not in shown.out + shown.err + found.table() + repr(found)
    assert "headless" in found.table()


def test_a_missing_secret_is_no_matter(secrets, elsewhere):
    elsewhere.setenv("KAGGLE_KERNEL_RUN_TYPE", "Interactive")
    elsewhere.setattr(secrets.UserSecretsClient, "get_secret", lambda self, label: {}[label])
    env.platforms.hand_over_token()
    assert "HF_TOKEN" not in os.environ


def test_colab_trains_on_its_own_disk_and_keeps_copies_in_drive(elsewhere, tmp_path):
    elsewhere.setenv("COLAB_RELEASE_TAG", "release-colab-2026.08")
    elsewhere.setattr(env.folders, "_DRIVE", tmp_path / "MyDrive")
    assert env.runs_dir() == Path("/content/runs")
    assert env.keep_dir() is None
    words = env.checkup.Setup("colab", False, *[None] * 3, env.runs_dir(), [])._runs()
    assert "mount Drive" in words
    (tmp_path / "MyDrive").mkdir()
    assert env.keep_dir() == tmp_path / "MyDrive" / "lora_nb" / "runs"
    words = env.checkup.Setup("colab", False, *[None] * 3, env.runs_dir(), [])._runs()
    assert "copied to" in words


@pytest.mark.parametrize(
    ("gigabytes", "fits"), [(15, "tiny, sd15, sdxl"), (8, "tiny, sd15"), (4, "tiny")]
)
def test_doctor_says_what_should_fit(gpu, monkeypatch, gigabytes, fits):
    gpu("Tesla T4", T4, gigabytes)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    memory = next(check for check in env.doctor() if check.name == "memory")
    assert memory.found.endswith(f"2 GPUs of {gigabytes}.0 GB, where by prediction fits: {fits}")


def test_hosted_fixes_leave_torch_and_kernel_alone(elsewhere):
    elsewhere.setenv("COLAB_RELEASE_TAG", "release-colab-2026.08")
    assert env.checkup._version("numpy", "99.0", "99.1").fix == (
        'pip install --no-deps "numpy>=99.0"'
    )


def test_a_package_replaced_under_the_running_kernel_wants_a_restart(elsewhere):
    import peft

    elsewhere.setattr(peft, "__version__", "0.1.0")
    check = next(check for check in env.doctor() if check.name == "peft")
    assert not check.ok
    assert "0.1.0 in memory" in check.found
    assert "restart" in check.fix


def test_python_does_not_look_for_cycles_among_the_libraries_when_it_ends():
    code = (
        "import atexit, gc; atexit.register(lambda: print(len(gc.get_objects()))); "
        "import lora_nb, torch; print(len(gc.get_objects()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    before, at_the_end = map(int, done.stdout.split())
    assert at_the_end < 0.01 * before


@pytest.mark.skipif(sys.platform != "linux", reason="torch has another OpenMP elsewhere")
@pytest.mark.parametrize(("own", "expected"), [({}, "500"), ({"GOMP_SPINCOUNT": "7"}, "7")])
def test_threads_of_torch_wait_as_the_package_says_unless_the_user_does(own, expected):
    environment = {k: v for k, v in os.environ.items() if k != "GOMP_SPINCOUNT"} | own
    done = subprocess.run(
        [sys.executable, "-c", "import lora_nb, torch"],
        env=environment | {"OMP_DISPLAY_ENV": "verbose"}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert f"GOMP_SPINCOUNT = '{expected}'" in done.stderr
