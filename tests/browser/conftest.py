"""A JupyterLab for the browser tests, or the reason why there is none."""

import importlib.util
import os
from pathlib import Path

import pytest

from .lab import CHROMIUM, Lab

REPO = Path(__file__).resolve().parents[2]
PICTURES = REPO / "runs" / "browser"  # screenshots, to be looked at


@pytest.fixture(scope="session")
def lab(tmp_path_factory):
    """One JupyterLab in Chromium for all tests; skips, and says why, where one of them is missing."""
    if CHROMIUM is None:
        pytest.skip("no Chromium here: apt-get install chromium")
    if importlib.util.find_spec("playwright") is None:
        pytest.skip("no Playwright here: pip install -e '.[test]'")
    folder = tmp_path_factory.mktemp("lab")
    environment = {k: v for k, v in os.environ.items() if k not in ("CI", "LORA_NB_HEADLESS")}
    environment |= {"LORA_NB_RUNS": str(folder / "runs"), "OMP_NUM_THREADS": "1"}
    with Lab(folder, PICTURES, environment) as lab:
        yield lab
        assert lab.errors == []
