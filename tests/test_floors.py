"""The design, held by reading the source: imports go down only, and some names live in one place only."""

import ast
import re
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "lora_nb"
# Within a floor a module may import those to its left.
FLOORS = (
    ("collector", "errors", "redaction", "files", "show", "config", "flags", "rng", "env"),
    ("objectives", "data", "families"),
    (
        "adapters",
        "projections",
        "tokens",
        "channels_last",
        "forwards",
        "packing",
        "resnets",
        "compiling",
        "kernels",
        "fusing",
        "disk_cache",
        "cache",
        "loss",
        "formats",
        "optimization",
    ),
    (
        "class_pictures",
        "memory",
        "offload",
        "precision",
        "lock",
        "checkpoint",
        "run_folder",
        "run_state",
        "stopping",
        "probe",
        "health",
        "trackers",
        "processes",
        "learning_rates",
        "learner",
        "batches",
        "gradients",
        "graphed",
        "monitor",
        "run_checkpoints",
        "trainer",
        "branching",
        "early_stopping",
        "inference",
        "forecast",
        "background",
        "launch",
    ),
    ("judge", "metrics", "sweep", "rank_study", "plots", "board_figure", "report", "hub"),
    ("widgets", "checks", "bench", "cli", "__main__"),
)
RANK = {
    name: (floor, place) for floor, names in enumerate(FLOORS) for place, name in enumerate(names)
}
ONE_HOME = {"matplotlib": "plots", "ipywidgets": "widgets"}
FORBIDDEN_CALLS = {
    "eval",
    "exec",
    "compile",
    "__import__",
    "torch.load",
    "os.system",
    "pickle.load",
    "pickle.loads",
}
FORBIDDEN_IMPORTS = {"pickle", "dill", "cloudpickle", "marshal", "shelve"}
FORBIDDEN_KEYWORDS = {"trust_remote_code", "allow_pickle"}
FAMILY = re.compile(
    r"\b(sd|sd15|sd1|sd2|sd3|sdxl|flux|z_image|kandinsky|wuerstchen)\b", re.IGNORECASE
)
REFERENCE_DEFAULTS = {"sd-model-finetuned-lora"}  # the reference script's own words
FAMILY_HOMES = {"families", "env"}  # env holds the presets
HEAVY_AT_TOP = {
    "torch",
    "diffusers",
    "transformers",
    "datasets",
    "peft",
    "accelerate",
    "matplotlib",
    "ipywidgets",
}

FILES = sorted(PACKAGE.rglob("*.py"))
IDS = [str(file.relative_to(PACKAGE)) for file in FILES]
each_file = pytest.mark.parametrize("file", FILES, ids=IDS)


def module_of(file: Path) -> str:
    """The module of a file, or the sub-package it belongs to."""
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(tree: ast.AST) -> list[str]:
    """Dotted names of everything imported anywhere, "lora_nb.x" for each x of `from lora_nb import x`."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: imports are absolute here"
            bare = node.module == "lora_nb"
            found += [f"lora_nb.{alias.name}" for alias in node.names] if bare else [node.module]
    return found


def docstrings(tree: ast.AST) -> set[int]:
    """The ids of docstring nodes: prose may name a family."""
    owners = (ast.Module, ast.ClassDef, ast.FunctionDef)
    return {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, owners) and node.body and isinstance(node.body[0], ast.Expr)
    }


def upward(file: Path, tree: ast.AST) -> list[str]:
    """What a file imports from our package although it lies no lower."""
    own = module_of(file)
    if own == "__init__":
        return [name for name in imports(tree) if name.startswith("lora_nb")]
    wrong = []
    for name in imports(tree):
        parts = name.split(".")
        if parts[0] != "lora_nb" or parts[1:2] == [own]:
            continue
        if len(parts) == 1 or RANK[parts[1]] >= RANK[own]:
            wrong.append(name)
    return wrong


def broken_rules(file: Path, tree: ast.AST) -> list[str]:
    """Every rule of DESIGN.md, other than floors, that a file breaks."""
    own, prose, found = module_of(file), docstrings(tree), []
    for name in imports(tree):
        top = name.split(".")[0]
        if ONE_HOME.get(top, own) != own:
            found.append(f"{top} belongs in {ONE_HOME[top]}")
        if top in FORBIDDEN_IMPORTS:
            found.append(f"import {top}")
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func) in FORBIDDEN_CALLS:
            found.append(f"line {node.lineno}: {ast.unparse(node.func)}()")
        if isinstance(node, ast.keyword):
            shell = node.arg == "shell" and ast.unparse(node.value) != "False"
            if shell or node.arg in FORBIDDEN_KEYWORDS:
                found.append(f"line {node.value.lineno}: {node.arg}=")
        if own not in FAMILY_HOMES:
            text = node.value if isinstance(node, ast.Constant) and id(node) not in prose else None
            text = (
                node.id
                if isinstance(node, ast.Name)
                else node.attr
                if isinstance(node, ast.Attribute)
                else text
            )
            if isinstance(text, str) and text not in REFERENCE_DEFAULTS and FAMILY.search(text):
                found.append(f"line {node.lineno}: the family name in {text!r}")
    return found


def test_every_module_has_a_floor():
    assert {module_of(file) for file in FILES} - {"__init__"} <= set(RANK)


@each_file
def test_imports_go_down(file):
    assert upward(file, ast.parse(file.read_text(encoding="utf-8"))) == []


@each_file
def test_rules(file):
    assert broken_rules(file, ast.parse(file.read_text(encoding="utf-8"))) == []


LIGHT = ["__init__", "errors", "files", "show", "config", "env"]


@pytest.mark.parametrize("file", [f for f in FILES if module_of(f) in LIGHT], ids=str)
def test_light_modules_import_heavy_ones_inside_functions(file):
    tree = ast.parse(file.read_text(encoding="utf-8"))
    tops = {name.split(".")[0] for node in tree.body for name in imports(ast.Module([node], []))
            if not isinstance(node, ast.FunctionDef | ast.ClassDef)}  # fmt: skip
    assert not tops & HEAVY_AT_TOP


@each_file
def test_module_says_what_lives_in_it(file):
    assert ast.get_docstring(ast.parse(file.read_text(encoding="utf-8")))


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("data", "from lora_nb.trainer import train"),
        ("data", "from lora_nb import cache"),
        ("config", "def f():\n    from lora_nb import env"),
        ("__init__", "from lora_nb.config import TrainConfig"),
    ],
)
def test_an_import_upwards_is_found(module, source):
    assert upward(PACKAGE / f"{module}.py", ast.parse(source))


@pytest.mark.parametrize(
    "source",
    [
        "import matplotlib.pyplot",
        "from ipywidgets import Button",
        "import pickle",
        "torch.load(path)",
        "eval('1')",
        "subprocess.run('ls', shell=True)",
        "load(trust_remote_code=True)",
        "if family == 'sdxl': pass",
        "is_flux = sdxl",
    ],
)
def test_a_broken_rule_is_found(source):
    assert broken_rules(PACKAGE / "trainer.py", ast.parse(source))


def test_prose_may_name_a_family():
    assert not broken_rules(PACKAGE / "trainer.py", ast.parse('"""As in SD 1.5."""'))
