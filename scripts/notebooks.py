"""Write what all notebooks share, badges and setup cell, from the public address in pyproject.toml; strip outputs.

python scripts/notebooks.py            rewrite the notebooks where needed
python scripts/notebooks.py --check    change nothing; exit 1 and name the notebooks that need it
"""

import sys
import tomllib
from pathlib import Path

import nbformat
from nbformat import NotebookNode

REPO = Path(__file__).resolve().parents[1]
COLAB = "https://colab.research.google.com"
KAGGLE = "https://kaggle.com"
# Fields that a run or an editor leaves behind; what is not listed here stays (tags, nbmake's settings).
CELL_NOISE = (
    "collapsed",
    "scrolled",
    "execution",
    "ExecuteTime",
    "outputId",
    "colab",
    "editable",
    "slideshow",
)
NOTEBOOK_METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


def address() -> str:
    """The repository's public address; pyproject.toml is the one place where it stands."""
    text = (REPO / "pyproject.toml").read_text(encoding="utf-8")
    return tomllib.loads(text)["project"]["urls"]["Repository"]


def setup_cell() -> str:
    """The first code cell of every notebook: import the package or fetch it, then look around."""
    # Not into a folder named lora_nb: beside the notebook that would itself be imported, as an empty package. A folder
    # that an interrupted run has left is no obstacle.
    return f"""\
try:
    import lora_nb
except ImportError:  # a fresh Colab or Kaggle: fetch the course, keep what is installed
    !git clone -q --depth 1 {address()} course; pip install -q --no-deps -e course
    import site

    site.main()  # this kernel looks again for installed packages
    import lora_nb
env = lora_nb.setup()"""


def badges(name: str) -> str:
    """Markdown of the badges that open notebooks/<name> on Colab and Kaggle."""
    url = address()
    path = f"{url.removeprefix('https://github.com/')}/blob/main/notebooks/{name}"
    return (
        f"[![Open in Colab]({COLAB}/assets/colab-badge.svg)]({COLAB}/github/{path})\n"
        f"[![Open in Kaggle]({KAGGLE}/static/images/open-in-kaggle.svg)]"
        f"({KAGGLE}/kernels/welcome?src=https://github.com/{path})"
    )


def tidy(text: str, name: str) -> str:
    """The notebook's JSON with the shared cells in place and nothing left of any run."""
    notebook = nbformat.reads(text, as_version=4)
    cells = notebook.cells
    _place(cells, "badges", nbformat.v4.new_markdown_cell(badges(name), id="badges"), 1)
    first_code = next((i for i, cell in enumerate(cells) if cell.cell_type == "code"), len(cells))
    _place(cells, "setup", nbformat.v4.new_code_cell(setup_cell(), id="setup"), first_code)
    for cell in cells:
        for key in CELL_NOISE:
            cell.metadata.pop(key, None)
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    notebook.metadata = NotebookNode(NOTEBOOK_METADATA)
    notebook.nbformat_minor = 5
    return nbformat.writes(notebook) + "\n"


def _place(cells: list[NotebookNode], tag: str, cell: NotebookNode, default: int) -> None:
    """Replace the cell of that tag, or insert it at the default place."""
    cell.metadata["tags"] = [tag]
    found = [i for i, old in enumerate(cells) if tag in old.metadata.get("tags", [])]
    if found:
        cells[found[0]] = cell
    else:
        cells.insert(default, cell)


def main() -> int:
    """Tidy all notebooks, or with --check only say which need it."""
    check = "--check" in sys.argv[1:]
    stale = []
    for path in sorted((REPO / "notebooks").glob("*.ipynb")):
        text = path.read_text(encoding="utf-8")
        wanted = tidy(text, path.name)
        if wanted != text:
            stale.append(path.name)
            if not check:
                path.write_text(wanted, encoding="utf-8")
    if stale:
        print(f"{'need' if check else 'rewrote'}: {', '.join(stale)}")
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
