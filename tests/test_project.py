"""The project's own files agree with each other: dependencies, lock, Makefile, licences, addresses, sizes."""

import ast
import importlib.metadata
import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from lora_nb import env

REPO = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((REPO / "pyproject.toml").read_text(encoding="utf-8"))["project"]
URL = PROJECT["urls"]["Repository"]
MARKDOWN = sorted(path for path in REPO.glob("*.md"))
SOURCES = sorted((REPO / "lora_nb").rglob("*.py"))


def pins(name: str) -> dict[str, Version]:
    """The versions of a constraints file by canonical name."""
    lines = (REPO / "constraints" / name).read_text(encoding="utf-8").splitlines()
    pairs = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(package): Version(version) for package, version in pairs}


def requirements(*extras: str) -> dict[str, Requirement]:
    """What pyproject asks for at run time and for some extras."""
    lists = [
        PROJECT["dependencies"],
        *(PROJECT["optional-dependencies"][extra] for extra in extras),
    ]
    return {
        canonicalize_name(r.name): r for r in (Requirement(line) for part in lists for line in part)
    }


def tracked() -> list[Path]:
    """The files that git has or would take."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=REPO, capture_output=True, text=True, check=True,
    ).stdout.split("\0")  # fmt: skip
    return [REPO / name for name in listed if name and (REPO / name).is_file()]


def test_lock_covers_every_dependency_and_meets_it():
    lock = pins("cpu-lock.txt")
    for name, requirement in requirements("lab", "test", "track").items():
        assert name in lock, f"{name} is not in the lock"
        assert lock[name] in requirement.specifier


def test_floors_are_no_higher_than_what_colab_ships():
    colab = pins("colab-2026.08.txt")
    wanted = requirements()
    assert len(wanted.keys() & colab.keys()) >= 12
    for name in wanted.keys() & colab.keys():
        assert colab[name] in wanted[name].specifier


def test_the_doctor_knows_floors_and_tested_versions():
    lock, wanted = pins("cpu-lock.txt"), requirements()
    for name, (floor, tested) in env.VERSIONS.items():
        key = canonicalize_name(name)
        assert str(wanted[key].specifier) == f">={floor}"
        assert lock[key] == Version(tested)


def test_the_tests_run_on_the_locked_versions():
    lock = pins("cpu-lock.txt")
    for name in env.VERSIONS:
        assert (
            Version(importlib.metadata.version(name).split("+")[0]) == lock[canonicalize_name(name)]
        )


def test_imports_of_the_package_are_declared():
    standard = sys.stdlib_module_names | {
        "lora_nb",
        "google",
        "kaggle_secrets",
        "bitsandbytes",
        "trackio",
    }
    named = {"PIL": "pillow"}
    through = {
        "tokenizers": "transformers",
        "httpx": "huggingface-hub",
        "IPython": "ipywidgets",
        "triton": "torch",  # builds for a GPU bring it
    }
    wanted = requirements()
    for file in SOURCES:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            modules = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            modules += [node.module] if isinstance(node, ast.ImportFrom) else []
            for top in {module.split(".")[0] for module in modules} - standard:
                assert canonicalize_name(named.get(top, through.get(top, top))) in wanted, (
                    f"{file.name}: {top}"
                )


def conda() -> tuple[list, list[str]]:
    """environment.yml: the conda dependencies without pip's, and pip's."""
    parsed = yaml.safe_load((REPO / "environment.yml").read_text(encoding="utf-8"))
    plain = [d for d in parsed["dependencies"] if isinstance(d, str)]
    (pip,) = [d["pip"] for d in parsed["dependencies"] if isinstance(d, dict)]
    return plain, pip


def test_conda_brings_python_and_pip_only():
    plain, pip = conda()
    names = [re.split(r"[=<>]", d)[0] for d in plain]
    assert names == ["python", "pip"]
    assert (
        Version(plain[0].split("=")[1]) in Requirement(f"x{PROJECT['requires-python']}").specifier
    )
    assert pip == ["-c constraints/cpu-lock.txt", "-e .[lab,test]"]


@pytest.mark.slow
def test_the_pip_part_of_the_conda_environment_resolves():
    """Dry run, offline: everything is installed, so pip has only to agree that nothing is missing or in conflict."""
    arguments = [word for line in conda()[1] for word in line.split()]
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--dry-run",
        "--no-index",
        "--no-build-isolation",
        *arguments,
    ]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    would = [line for line in done.stdout.splitlines() if line.startswith("Would install")]
    assert all(re.fullmatch(r"Would install lora[-_]nb-\S+", line) for line in would)


def test_makefile_has_its_targets():
    done = subprocess.run(
        ["make", "-n", "-o", ".venv/.ready", "course", "test", "lab"],
        cwd=REPO,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    for words in (
        "scripts/course.py",
        "ruff check .",
        "ruff format --check .",
        "-m pytest",
        "jupyter lab",
    ):
        assert words in done.stdout
    assert (REPO / ".ci" / "run").stat().st_mode & 0o100
    assert "make test" in (REPO / ".ci" / "run").read_text()


def test_makefile_sets_up_once(tmp_path):
    """A second run has nothing to set up; a changed lock has."""
    for name in ("Makefile", "pyproject.toml"):
        (tmp_path / name).write_bytes((REPO / name).read_bytes())
    for folder in ("constraints", ".venv"):
        (tmp_path / folder).mkdir()
    lock, ready = tmp_path / "constraints" / "cpu-lock.txt", tmp_path / ".venv" / ".ready"
    lock.touch()

    def plan() -> str:
        return subprocess.run(
            ["make", "-n", "course"], cwd=tmp_path, capture_output=True, text=True, check=True
        ).stdout

    assert "pip install" in plan()
    ready.touch()
    assert "pip install" not in plan()
    later = ready.stat().st_mtime + 10
    os.utime(lock, (later, later))
    assert "pip install" in plan()


def test_the_address_stands_in_one_place():
    places = {}
    for path in tracked():
        if (
            path.suffix in {".py", ".md", ".toml", ".yml", ".ipynb", ".txt"}
            or path.name == "Makefile"
        ):
            count = path.read_text(encoding="utf-8").count(URL.removeprefix("https://github.com/"))
            places |= {path.relative_to(REPO).as_posix(): count} if count else {}
    generated = {name for name in places if name.startswith("notebooks/")} | {"README.md"}
    assert set(places) - generated == {"pyproject.toml"}
    assert places["pyproject.toml"] == 1


@pytest.mark.parametrize("path", MARKDOWN, ids=lambda path: path.name)
def test_links_of_documents_lead_somewhere(path):
    text = re.sub(r"```.*?```", "", path.read_text(encoding="utf-8"), flags=re.S)
    for target in re.findall(r"\]\(([^)#\s]+)", text) + re.findall(
        r'(?:src|href)="([^"#]+)"', text
    ):
        if not target.startswith(("http://", "https://", "mailto:")):
            assert (path.parent / target).exists(), target
        elif "/blob/main/" in target:
            assert URL.removeprefix("https://github.com/") in target
            assert (REPO / target.split("/blob/main/")[1]).exists(), target


# Tokens of the Hub, GitHub, Weights & Biases, Google, AWS and OpenAI-like services, and private keys.
SECRET = re.compile(
    rb"\b(hf_[A-Za-z0-9]{30,}|gh[pousr]_[A-Za-z0-9]{36}|wandb_v1_\w{20,}|AIza[\w-]{35}|AKIA[A-Z0-9]{16}"
    rb"|sk-[A-Za-z0-9_-]{32,})|-----BEGIN [A-Z ]*PRIVATE KEY-----"
)


def test_no_secret_is_in_git():
    assert SECRET.search(b"'hf_" + b"aB3" * 12 + b"'")
    assert SECRET.search(b"-----BEGIN RSA " + b"PRIVATE KEY-----")
    for path in tracked():
        if path.suffix != ".safetensors":
            assert not SECRET.search(path.read_bytes()), path


def test_no_file_is_over_20_mb():
    assert [str(path) for path in tracked() if path.stat().st_size > 20e6] == []


def test_everything_that_is_built_from_is_in_git():
    names = {path.relative_to(REPO).as_posix() for path in tracked()}
    for name in (
        "data/build/pretrain.py",
        "data/base/model_index.json",
        "LICENSE",
        "Makefile",
        ".ci/run",
    ):
        assert name in names


def test_licences():
    text = (REPO / "LICENSE").read_text(encoding="utf-8")
    assert "Apache License" in text
    assert "Version 2.0, January 2004" in text
    assert "END OF TERMS AND CONDITIONS" in text
    assert PROJECT["license"] == "Apache-2.0"


DATA = sorted(path.parent for path in REPO.glob("data/*/README.md") if path.parent.name != "build")


@pytest.mark.parametrize("folder", DATA, ids=lambda path: path.name)
def test_data_says_where_it_comes_from(folder):
    head = re.match(r"---\n(.*?)\n---\n", (folder / "README.md").read_text(encoding="utf-8"), re.S)
    card = yaml.safe_load(head[1])
    assert card["license"]
    assert (folder / "LICENSE").stat().st_size > 500


@pytest.mark.parametrize(
    "folder",
    [path for path in DATA if path.name not in ("base", "judge")],
    ids=lambda path: path.name,
)
def test_pictures_and_metadata_agree(folder):
    splits = [path for path in folder.iterdir() if path.is_dir()]
    assert splits
    for split in splits:
        lines = (split / "metadata.jsonl").read_text(encoding="utf-8").splitlines()
        rows = [json.loads(line) for line in lines]
        files = sorted(path.name for path in split.iterdir() if path.name != "metadata.jsonl")
        assert sorted(row["file_name"] for row in rows) == files
        assert all(row["text"].strip() for row in rows)


def test_there_are_data_sets_and_a_base():
    assert {"base", "judge"} < {path.name for path in DATA}
    assert len(DATA) >= 5
