"""The notebooks by numbers, their exercises, and their runs: in order in one workspace, and each alone."""

import ast
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from statistics import median

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

REPO = Path(__file__).resolve().parents[1]
CORE = ("00_setup", "01_dataset", "02_lora_config", "03_training", "04_inference")
NOTEBOOKS = sorted((REPO / "notebooks").glob("*.ipynb"))
CHAPTERS = (
    "05_rank_and_learning_rate",
    "06_dreambooth",
    "07_combining",
    "08_formats_and_sharing",
    "09_families",
    "10_bug_museum",
    "11_on_a_gpu",
)
# A notebook whose inputs are missing, and the one that writes them; every other one opens and runs on its own.
NEEDS = {"03_training": "02_lora_config", "04_inference": "03_training"}
# A chapter beyond the core that needs no other notebook's files has nothing to show here; it runs alone.
IN_ORDER = [path for path in NOTEBOOKS if path.stem in (*CORE, *NEEDS)]
# Parameters with which make test runs the chapters that take minutes; make test-long runs them as they stand.
SHORT = {
    "05_rank_and_learning_rate": {"STEPS": 6, "RANKS": [4, 16], "FACTORS": [0.25, 1, 4]},
    "06_dreambooth": {"STEPS": 10},
    "07_combining": {"STEPS": 20},
    "08_formats_and_sharing": {"STEPS": 20},
    "11_on_a_gpu": {"STEPS": 4},
}
# What ran in order without needing anything before it need not be run again.
ALONE = [path for path in NOTEBOOKS if path.stem in NEEDS or path not in IN_ORDER]

spec = importlib.util.spec_from_file_location("notebooks", REPO / "scripts" / "notebooks.py")
tool = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tool)

each = pytest.mark.parametrize("path", NOTEBOOKS, ids=[path.stem for path in NOTEBOOKS])


# The numbers of DESIGN.md


def code(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def lines(cell: nbformat.NotebookNode) -> list[str]:
    return [line for line in cell.source.splitlines() if line.strip()]


def tagged(notebook: nbformat.NotebookNode, tag: str) -> list[nbformat.NotebookNode]:
    return [cell for cell in notebook.cells if tag in cell.metadata.get("tags", [])]


def prose(notebook: nbformat.NotebookNode) -> str:
    """The markdown without code blocks, solutions, images and the targets of links."""
    cells = [
        c.source
        for c in notebook.cells
        if c.cell_type == "markdown" and "badges" not in c.metadata.get("tags", [])
    ]
    text = re.sub(r"<details>.*?</details>|```.*?```", "", "\n\n".join(cells), flags=re.S)
    text = re.sub(r"!\[[^\]]*\]\([^)]*\)|(?<=\])\([^)]*\)|<[^>]+>", "", text)
    return re.sub(r"`[^`]*`", "x", text)


def literals_only(cell: nbformat.NotebookNode) -> bool:
    """Whether a cell assigns literals to plain names and does nothing else."""
    for node in ast.parse(cell.source).body:
        if not (
            isinstance(node, ast.Assign) and all(isinstance(t, ast.Name) for t in node.targets)
        ):
            return False
        try:
            ast.literal_eval(node.value)
        except ValueError:
            return False
    return True


def python(cell: nbformat.NotebookNode) -> str:
    """The source with IPython's own lines (! and %) taken out."""
    return re.sub(r"^(\s*)[!%].*$", r"\1pass", cell.source, flags=re.M)


def complaints(notebook: nbformat.NotebookNode) -> list[str]:
    """Every number and rule for a notebook that this one does not keep."""
    cells, found = code(notebook), []
    counts = [len(lines(cell)) for cell in cells]
    words = len(re.findall(r"\S*[A-Za-z]\S*", prose(notebook)))

    def want(kept: object, complaint: str) -> None:
        if not kept:
            found.append(complaint)

    want(12 <= len(cells) <= 20, f"{len(cells)} code cells, not 12 to 20")
    want(median(counts) <= 5, f"median of {median(counts)} lines, not at most 5")
    want(max(counts) <= 20, f"a cell of {max(counts)} lines, not at most 20")
    small = sum(count <= 10 for count in counts) / len(counts)
    want(small >= 0.85, f"{small:.0%} of the cells have at most 10 lines, not 85 %")
    want(
        6 <= words / sum(counts) <= 12,
        f"{words / sum(counts):.1f} words per line of code, not 6 to 12",
    )
    figures = sum(len(re.findall(r"\bplots\.\w+\(", cell.source)) for cell in cells)
    want(figures <= 6, f"{figures} figures, not at most 6")
    want(all(not c.outputs and c.execution_count is None for c in cells), "outputs are stored")

    want("setup" in cells[0].metadata.get("tags", []), "the first code cell is not the setup cell")
    parameters = tagged(notebook, "parameters")
    want(len(parameters) == 1, f"{len(parameters)} cells with the tag parameters, not one")
    want(parameters == cells[1:2], "the second code cell is not the parameters")
    want(all(literals_only(cell) for cell in parameters), "the parameters are not all literals")

    text, first = prose(notebook), notebook.cells[0].source
    want(first.startswith("# "), "it does not begin with a title")
    opening = "\n".join(c.source for c in notebook.cells[: notebook.cells.index(cells[0])])
    for phrase in ("you will", "minutes"):
        want(phrase in opening.lower(), f"{phrase!r} is not said before the first code")
    sections = re.findall(r"^## (\d+)\. ", text, flags=re.M)
    want(
        sections == [str(n + 1) for n in range(len(sections))],
        f"sections are numbered {', '.join(sections)}",
    )
    want(3 <= len(sections) <= 7, f"{len(sections)} numbered sections, not 3 to 7")
    want(re.search(r"^## .*\bchange\b", text, flags=re.M), "no heading says what you can change")
    want(re.search(r"^## Next", text, flags=re.M), "no heading says what comes next")
    for word in (r"\bsimply\b", r"\w!(?!\w)", "[\U0001f300-\U0001faff]"):
        want(not re.search(word, text), f"{word} stands in the prose")

    sources = "\n".join(cell.source for cell in cells[1:])
    for word in (
        "os.chdir",
        "sys.path",
        "!wget",
        "!pip",
        "%pip",
        "SMOKE",
        '"CI"',
        "import *",
        "drive.mount",
    ):
        want(word not in sources, f"{word} stands in the code")
    for cell in cells:
        ast.parse(python(cell))
    return found


@each
def test_numbers(path):
    assert complaints(nbformat.read(path, as_version=4)) == []


@each
def test_shared_cells_are_generated_and_nothing_is_left_of_a_run(path):
    assert tool.tidy(path.read_text(encoding="utf-8"), path.name) == path.read_text(
        encoding="utf-8"
    )
    nbformat.validate(nbformat.read(path, as_version=4))


@each
def test_links_lead_somewhere(path):
    text = "\n".join(
        c.source for c in nbformat.read(path, as_version=4).cells if c.cell_type == "markdown"
    )
    for target in re.findall(r"\]\(([^)#\s]+)", text):
        if target.startswith(tool.address()) and "/blob/main/" in target:
            target = "../" + target.split("/blob/main/")[1]
        assert target.startswith("http") or (path.parent / target).exists(), target


def test_the_course_is_complete():
    assert {path.stem for path in NOTEBOOKS} >= {*CORE, *CHAPTERS}


def good() -> nbformat.NotebookNode:
    """A made-up notebook that keeps every number."""
    opening = "# Title\n\nOne promise.\n\nYou will see. About 3 minutes, no GPU."
    sections = "\n\n".join(f"## {n}. Part\n\n" + "word " * 70 for n in (1, 2, 3))
    closing = "## What you can change, and where\n\nThis.\n\n## Next\n\nThat."
    work = [new_code_cell("a = 1\nb = 2") for _ in range(10)]
    parameters = new_code_cell('PRESET = "auto"\nSTEPS = None', metadata={"tags": ["parameters"]})
    cells = [
        new_markdown_cell(opening),
        parameters,
        new_markdown_cell(sections),
        *work,
        new_markdown_cell(closing),
    ]
    return nbformat.reads(
        tool.tidy(nbformat.writes(new_notebook(cells=cells)), "00_x.ipynb"), as_version=4
    )


def spoil(change: str) -> nbformat.NotebookNode:
    notebook = good()
    cells, last = code(notebook), code(notebook)[-1]
    if change == "long cell":
        last.source = "x = 1\n" * 21
    elif change == "little prose":
        notebook.cells[4].source = "## 1. a\n\n## 2. b\n\n## 3. c"
    elif change == "many figures":
        last.source = "plots.a()\n" * 7
    elif change == "output":
        last.execution_count = 1
    elif change == "parameters":
        cells[1].source = "STEPS = 10 * 2"
    elif change == "order":
        cells[1].metadata["tags"] = []
    elif change == "prose":
        notebook.cells[0].source += " You simply run it!"
    elif change == "few cells":
        notebook.cells = [cell for cell in notebook.cells if cell not in cells[4:]]
    elif change == "path":
        last.source = "os.chdir('/')"
    return notebook


def test_a_good_notebook_has_no_complaints():
    assert complaints(good()) == []


@pytest.mark.parametrize(
    "change",
    [
        "long cell",
        "little prose",
        "many figures",
        "output",
        "parameters",
        "order",
        "prose",
        "few cells",
        "path",
    ],
)
def test_a_spoiled_notebook_has_complaints(change):
    assert complaints(spoil(change))


# The setup cell


def test_setup_cell():
    cell = tool.setup_cell()
    assert len(lines(new_code_cell(cell))) <= 8
    assert tool.address() in cell
    ast.parse(python(new_code_cell(cell)))


def test_setup_cell_finds_a_fresh_install_in_the_same_kernel(tmp_path):
    """What Colab does: the import fails, pip installs an editable clone, site.main() makes it importable at once."""
    site_packages = tmp_path / "site"
    (tmp_path / "clone" / "fresh_nb").mkdir(parents=True)
    (tmp_path / "clone" / "fresh_nb" / "__init__.py").write_text("said = 'here'")
    site_packages.mkdir()
    code = (
        f"import pathlib, site; site.getsitepackages = lambda *_: [{str(site_packages)!r}]\n"
        "try:\n    import fresh_nb\nexcept ImportError:\n"
        f"    pathlib.Path({str(site_packages)!r}, 'clone.pth').write_text({str(tmp_path / 'clone')!r})\n"
        "    site.main()\n    import fresh_nb\nprint(fresh_nb.said)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "here\n", done.stderr


def test_what_widgets_and_runs_leave_in_a_notebook_is_taken_out():
    notebook = good()
    clean = nbformat.writes(notebook)
    notebook.metadata.widgets = {"application/vnd.jupyter.widget-state+json": {"state": {}}}
    notebook.metadata.colab = {"provenance": []}
    cell = code(notebook)[-1]
    cell.metadata["execution"] = {"iopub.status.busy": "2026-11-23T00:00:00Z"}
    cell.outputs, cell.execution_count = [nbformat.v4.new_output("stream", text="hf_token")], 3
    spoilt = nbformat.writes(notebook)
    assert "widget-state" in spoilt
    assert tool.tidy(spoilt, "00_x.ipynb").strip() == clean.strip()


def test_badges_lead_to_the_notebook():
    text = tool.badges("00_setup.ipynb")
    place = (
        tool.address().removeprefix("https://github.com/") + "/blob/main/notebooks/00_setup.ipynb"
    )
    assert text.count(place) == 2


# Exercises: the solution in <details> is right, the stub is "not yet", the usual mistakes are refused


def exercises() -> list[tuple[str, ast.Call, str, str]]:
    """(name, call of check, stub cell, solution) for each exercise of each notebook."""
    found = []
    for path in NOTEBOOKS:
        cells = nbformat.read(path, as_version=4).cells
        for place, cell in enumerate(cells):
            if cell.cell_type != "code":
                continue
            calls = [
                node for node in ast.walk(ast.parse(python(cell))) if isinstance(node, ast.Call)
            ]
            calls = [call for call in calls if ast.unparse(call.func).split(".")[-1] == "check"]
            later = "\n".join(c.source for c in cells[place + 1 :] if c.cell_type == "markdown")
            solutions = re.findall(
                r"<details>.*?```python\n(.*?)```.*?</details>", later, flags=re.S
            )
            found += [
                (call.args[0].value, call, cell.source, solutions[0] if solutions else "")
                for call in calls
            ]
    return found


EXERCISES = exercises()
each_exercise = pytest.mark.parametrize("exercise", EXERCISES, ids=[name for name, *_ in EXERCISES])


@pytest.fixture(scope="module")
def base_family():
    """The base model that the notebooks use without a GPU."""
    from lora_nb import env, load_family

    return load_family("auto", str(env.data_dir() / "base"))


@pytest.fixture
def namespace(base_family):
    """What an exercise cell may use besides its own names."""
    import math

    import torch
    import torch.nn.functional as F

    import lora_nb

    names = {"math": math, "torch": torch, "F": F, "lora_nb": lora_nb, "check": lora_nb.check}
    return names | {"family": base_family, "tokenizer": base_family.tokenizer}


def ask(call: ast.Call, names: dict, **more: object) -> bool:
    """Evaluate the answer and what is given along with it as the cell does, and check."""
    from lora_nb import check

    def value(node: ast.expr) -> object:
        return eval(ast.unparse(node), names)

    given = {keyword.arg: value(keyword.value) for keyword in call.keywords}
    return check(call.args[0].value, value(call.args[1]), **given | more)


@each_exercise
def test_solution_is_right(exercise, namespace):
    name, call, _, solution = exercise
    assert solution, f"{name} has no solution in <details>"
    exec(solution, namespace)
    assert ask(call, namespace, strict=True)


@each_exercise
def test_stub_is_not_yet_and_lets_the_notebook_go_on(exercise, namespace, capsys):
    _, call, stub, _ = exercise
    body = "\n".join(
        line for line in stub.splitlines() if not re.match(r"\s*(lora_nb\.)?check\(", line)
    )
    exec(body, namespace)
    assert not ask(call, namespace)
    assert "not yet" in capsys.readouterr().out


@each_exercise
def test_usual_mistakes_are_refused(exercise, namespace):
    from lora_nb import checks

    name, call, _, _ = exercise
    given = {k.arg: eval(ast.unparse(k.value), namespace) for k in call.keywords}
    mistakes = checks.EXERCISES[name].task(**given).mistakes
    assert mistakes
    for wrong in mistakes.values():
        with pytest.raises(checks.WrongAnswer):
            checks.check(name, wrong, strict=True, **given)


def test_every_notebook_has_two_or_three_exercises_and_none_is_left_over():
    from lora_nb import checks

    names = [name for name, *_ in EXERCISES]
    assert sorted(names) == sorted(checks.EXERCISES)
    for path in NOTEBOOKS:
        assert 2 <= sum(name.startswith(path.stem[:2] + ".") for name in names) <= 3, path.stem


# Runs


def nbmake(path: Path, runs: Path) -> subprocess.CompletedProcess:
    """Run one notebook as nbmake does, with that folder of runs; no network."""
    environment = os.environ | {"LORA_NB_RUNS": str(runs)}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "--nbmake",
        "--nbmake-timeout=600",
    ]
    return subprocess.run(
        [*command, str(path)], cwd=REPO, env=environment, capture_output=True, text=True
    )


@pytest.fixture(scope="module")
def workspace(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("course")


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("path", IN_ORDER, ids=[path.stem for path in IN_ORDER])
def test_runs_in_order(path, workspace):
    """The course as a learner takes it: one folder of runs for all."""
    done = nbmake(path, workspace)
    assert done.returncode == 0, done.stdout[-5000:]


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("path", ALONE, ids=[path.stem for path in ALONE])
def test_runs_alone(path, tmp_path):
    """With no runs there: it works, or it ends in one sentence that names the notebook to run first."""
    done = nbmake(with_parameters(path, SHORT.get(path.stem, {}), tmp_path), tmp_path / "runs")
    if path.stem not in NEEDS:
        assert done.returncode == 0, done.stdout[-5000:]
        return
    assert done.returncode == 1, "it ran without what it needs"
    printed = re.sub(r"\x1b\[[\d;]*m", "", done.stdout)  # without colours
    sentence = f"run {NEEDS[path.stem]}.ipynb first"
    assert re.search(rf"ConfigError: There is no \S+ yet: {re.escape(sentence)}", printed), printed[
        -5000:
    ]


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", SHORT)
def test_runs_alone_in_full(name, tmp_path):
    """The chapters that make test shortens, as a learner runs them."""
    done = nbmake(REPO / "notebooks" / f"{name}.ipynb", tmp_path)
    assert done.returncode == 0, done.stdout[-5000:]


def with_parameters(path: Path, values: dict[str, object], folder: Path) -> Path:
    """A copy of the notebook with other literals in its parameters cell; the notebook itself if there are none."""
    if not values:
        return path
    notebook = nbformat.read(path, as_version=4)
    (cell,) = tagged(notebook, "parameters")
    for name, value in values.items():
        cell.source, count = re.subn(
            rf"^{name} = .*$", f"{name} = {value!r}", cell.source, flags=re.M
        )
        assert count == 1, f"{path.name} has no parameter {name}"
    copy = folder / path.name
    nbformat.write(notebook, copy)
    return copy
