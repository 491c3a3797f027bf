"""JupyterLab in a headless Chromium, as a learner has it before him: open a notebook, run cells, move, click, look."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nbformat
import psutil
from nbformat.v4 import new_code_cell, new_notebook

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
SWITCHES = (
    "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --disable-dev-shm-usage"
).split()
# All cells stay in the page, and nothing asks the network for news.
SETTINGS = {
    "notebook-extension/tracker": {"windowingMode": "none", "kernelShutdown": True},
    "apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
}
PATIENCE = 240.0  # seconds; a busy machine is slow
KERNEL = "window.jupyterapp?.shell.currentWidget?.sessionContext?.session?.kernel"


class Lab:
    """A running JupyterLab with one page of a browser; use as a context manager."""

    def __init__(self, browser: Any, folder: Path, pictures: Path, environment: dict[str, str]):
        self.folder, self.pictures = folder, pictures
        self._browser, self._environment = browser, environment
        self.pictures.mkdir(parents=True, exist_ok=True)
        self.errors: list[str] = []

    def __enter__(self) -> "Lab":
        self._start_server()
        self.page = self._browser.new_page(viewport={"width": 1280, "height": 1400})
        self.page.set_default_timeout(1000 * PATIENCE)
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        return self

    def __exit__(self, *failure: object) -> None:
        self.page.close()
        self._server.send_signal(signal.SIGTERM)
        try:
            self._server.wait(20)
        except subprocess.TimeoutExpired:
            self._server.kill()
        self._log.close()

    def _start_server(self) -> None:
        settings = self.folder / "settings"
        for name, values in SETTINGS.items():
            file = settings / "@jupyterlab" / f"{name}.jupyterlab-settings"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(values))
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self._address = f"http://127.0.0.1:{port}"
        self._log = open(self.folder / "lab.log", "w")  # noqa: SIM115
        self._server = subprocess.Popen(
            [
                *(sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root"),
                *("--ip=127.0.0.1", f"--port={port}", f"--ServerApp.root_dir={self.folder}"),
                *("--IdentityProvider.token=", "--ServerApp.password="),
                "--LabApp.expose_app_in_browser=True",
            ],
            env=self._environment | {"JUPYTERLAB_SETTINGS_DIR": str(settings)},
            stdout=self._log,
            stderr=subprocess.STDOUT,
        )
        self.until(self._answers, "JupyterLab to answer")

    def _answers(self) -> bool:
        assert self._server.poll() is None, (self.folder / "lab.log").read_text()[-3000:]
        try:
            return urllib.request.urlopen(f"{self._address}/api", timeout=5).status == 200
        except OSError:
            return False

    def until(self, true: Callable[[], object], what: str, seconds: float = PATIENCE) -> object:
        """Wait for a condition and return its value; fails with what it waited for."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if value := true():
                return value
            if hasattr(self, "page"):
                self.page.wait_for_timeout(100)
            else:
                time.sleep(0.1)
        if hasattr(self, "page"):
            self.page.screenshot(path=self.pictures / "waited-too-long.png")
        raise AssertionError(f"waited {seconds:.0f} s for {what}; see {self.pictures}")

    def open(self, name: str, cells: list[str]) -> None:
        """Write a notebook of these code cells, open it and wait for its kernel, not only for its cells."""
        notebook = new_notebook(cells=[new_code_cell(source) for source in cells])
        notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3"}
        nbformat.write(notebook, self.folder / name)
        self.page.goto(f"{self._address}/lab/tree/{name}?reset")
        self.wait_for_kernel()

    def wait_for_kernel(self) -> None:
        self.page.wait_for_function(
            f"(() => {{ const k = {KERNEL}; return k && k.connectionStatus === 'connected' && k.status === 'idle' }})"
        )

    def start(self, cell: int) -> None:
        """Run a cell without waiting for its end."""
        self.page.evaluate(
            "cell => { const app = window.jupyterapp, book = app.shell.currentWidget.content;"
            " book.activeCellIndex = cell; book.deselectAll();"
            " app.commands.execute('notebook:run-cell') }",
            cell,
        )

    def run(self, *cells: int) -> None:
        """Run cells one by one to their end; none may fail."""
        for cell in cells:
            before = self.count(cell)
            self.start(cell)
            self.until(lambda cell=cell, before=before: self.count(cell) != before, f"cell {cell}")
            assert not self.failed(cell), self.text(cell)

    def count(self, cell: int) -> int | None:
        """The execution count of a cell that has ended, None while it runs."""
        return self.page.evaluate(
            "cell => { const c = window.jupyterapp.shell.currentWidget.content.widgets[cell];"
            " return c.model.executionState === 'idle' ? c.model.executionCount : null }",
            cell,
        )

    def running(self, cell: int) -> bool:
        return self.page.evaluate(
            "cell => window.jupyterapp.shell.currentWidget.content.widgets[cell].model.executionState"
            " !== 'idle'",
            cell,
        )

    def output(self, cell: int):
        """The place on the page below a cell."""
        return (
            self.page.locator(".jp-Notebook .jp-Cell").nth(cell).locator(".jp-Cell-outputWrapper")
        )

    def text(self, cell: int) -> str:
        """What one reads below a cell."""
        return self.output(cell).inner_text()

    def failed(self, cell: int) -> bool:
        """Whether a cell has ended in an error."""
        return self.page.evaluate(
            "cell => window.jupyterapp.shell.currentWidget.content.widgets[cell].model.outputs.toJSON()"
            ".some(output => output.output_type === 'error')",
            cell,
        )

    def pictures_in(self, cell: int) -> list[str]:
        """The sources of the pictures below a cell."""
        return self.output(cell).locator("img").evaluate_all("all => all.map(i => i.src)")

    def finished_figure(self, cell: int) -> bool:
        """Whether the picture below a cell is the sharp one that a board leaves at its end."""
        drawn = "all => all.some(i => i.naturalWidth > 1.9 * i.getAttribute('width'))"
        return self.output(cell).locator("img").evaluate_all(drawn)

    def show(self, cell: int, name: str) -> None:
        """Scroll to a cell and keep a screenshot of the page."""
        self.page.locator(".jp-Notebook .jp-Cell").nth(cell).scroll_into_view_if_needed()
        self.page.screenshot(path=self.pictures / f"{name}.png")

    def interrupt(self) -> None:
        """What the button with the square does."""
        self.page.evaluate(f"() => {KERNEL}.interrupt()")

    def kill(self) -> None:
        """SIGKILL to the kernel's process; JupyterLab starts another one and says so in a dialogue."""
        (kernel,) = [
            child
            for child in psutil.Process(self._server.pid).children(recursive=True)
            if "ipykernel_launcher" in " ".join(child.cmdline())
        ]
        os.kill(kernel.pid, signal.SIGKILL)
        button = self.page.locator(".jp-Dialog .jp-mod-accept")
        button.wait_for(state="visible")
        button.click()
        self.wait_for_kernel()
