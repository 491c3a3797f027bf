"""A browser for the browser tests, and a JupyterLab in it, or the reason why there is none."""

import importlib.util
import os
from pathlib import Path

import pytest

from .lab import CHROMIUM, SWITCHES, Lab

REPO = Path(__file__).resolve().parents[2]
PICTURES = REPO / "runs" / "browser"  # screenshots, to be looked at


@pytest.fixture(scope="session")
def browser():
    """One Chromium for all tests; skips, and says why, where there is none."""
    if CHROMIUM is None:
        pytest.skip("no Chromium here: apt-get install chromium")
    if importlib.util.find_spec("playwright") is None:
        pytest.skip("no Playwright here: pip install -e '.[test]'")
    from playwright.sync_api import sync_playwright

    PICTURES.mkdir(parents=True, exist_ok=True)
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=SWITCHES)
        yield chromium
        chromium.close()


@pytest.fixture(scope="session")
def lab(browser, tmp_path_factory):
    """One JupyterLab for all tests."""
    folder = tmp_path_factory.mktemp("lab")
    environment = {k: v for k, v in os.environ.items() if k not in ("CI", "LORA_NB_HEADLESS")}
    environment |= {"LORA_NB_RUNS": str(folder / "runs"), "OMP_NUM_THREADS": "1"}
    with Lab(browser, folder, PICTURES, environment) as lab:
        yield lab
        assert lab.errors == []
