"""Run the course: execute the notebooks in order on the embedded base model, offline, into runs/course.

`make course` calls this. What an earlier call left in runs/course is replaced; other runs are not touched.
"""

import os
import shutil
import sys
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

REPO = Path(__file__).resolve().parents[1]
COURSE = REPO / "runs" / "course"
CELL_SECONDS = 900  # no cell of the course takes nearly as long on two cores
ENVIRONMENT = {
    "LORA_NB_RUNS": str(COURSE),
    "LORA_NB_DATA": str(REPO / "data"),
    "LORA_NB_HEADLESS": "1",
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TOKENIZERS_PARALLELISM": "false",
}


def main() -> int:
    """Execute the notebooks and say where everything is; 1 if a cell fails or no adapter or report is there."""
    os.environ |= ENVIRONMENT
    shutil.rmtree(COURSE, ignore_errors=True)
    (COURSE / "notebooks").mkdir(parents=True)
    total = time.perf_counter()
    for source in sorted((REPO / "notebooks").glob("0[0-4]_*.ipynb")):
        began = time.perf_counter()
        print(f"{source.stem:<20}", end="", flush=True)
        try:
            execute(source, COURSE / "notebooks" / source.name)
        except CellExecutionError as error:
            print(f"failed after {time.perf_counter() - began:.0f} s\n{error}")
            return 1
        print(f"{time.perf_counter() - began:6.0f} s", flush=True)
    print(f"{'all':<20}{time.perf_counter() - total:6.0f} s\n")
    found = {
        "adapter": newest("*/pytorch_lora_weights.safetensors"),
        "report": newest("*/report.html"),
        "notebooks": COURSE / "notebooks",
    }
    for name, path in found.items():
        print(f"{name:<12}{path.relative_to(REPO) if path else 'missing'}")
    return 0 if all(found.values()) else 1


def execute(source: Path, target: Path) -> None:
    """Run one notebook in its own folder and write it with its outputs, also when a cell fails."""
    notebook = nbformat.read(source, as_version=4)
    client = NotebookClient(
        notebook,
        timeout=CELL_SECONDS,
        resources={"metadata": {"path": str(source.parent)}},
        extra_arguments=[
            "--log-level=ERROR"
        ],  # kernels warn about TCP on this machine's own loopback
    )
    try:
        client.execute()
    finally:
        nbformat.write(notebook, target)


def newest(pattern: str) -> Path | None:
    """The file under runs/course that was written last."""
    return max(COURSE.glob(pattern), key=lambda path: path.stat().st_mtime, default=None)


if __name__ == "__main__":
    sys.exit(main())
