"""A real JupyterLab on a free loopback port, with folders of its own, and a real browser."""

import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook

ROOT = Path(__file__).parents[2]
FLAGS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage",
]


@pytest.fixture(scope="session")
def chromium():
    """The machine's chromium; None for the one that playwright has downloaded."""
    return next(filter(None, map(shutil.which, ["chromium", "chromium-browser", "google-chrome"])), None)


@pytest.fixture(scope="session")
def lab(tmp_path_factory):
    """(url, token, folder) of a running JupyterLab."""
    home = tmp_path_factory.mktemp("lab")
    work = home / "work"
    work.mkdir()
    for notebook in (ROOT / "notebooks").glob("*.ipynb"):
        shutil.copy(notebook, work)
    settings = home / "config" / "lab" / "user-settings" / "@jupyterlab"
    for name, text in {
        "apputils-extension/notification": '{"fetchNews": "false", "checkForUpdates": false}',
        "notebook-extension/tracker": '{"windowingMode": "none"}',
        "docmanager-extension/plugin": '{"autosave": false}',
    }.items():
        path = settings / f"{name}.jupyterlab-settings"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    token = secrets.token_hex(16)
    environment = {
        **os.environ,
        "JUPYTER_CONFIG_DIR": str(home / "config"),
        "JUPYTERLAB_SETTINGS_DIR": str(home / "config" / "lab" / "user-settings"),
        "JUPYTERLAB_WORKSPACES_DIR": str(home / "workspaces"),
        "JUPYTER_DATA_DIR": str(home / "data"),
        "JUPYTER_RUNTIME_DIR": str(home / "runtime"),
        "IPYTHONDIR": str(home / "ipython"),
        "PYDEVD_DISABLE_FILE_VALIDATION": "1",
    }
    with (home / "lab.log").open("w") as log:
        server = subprocess.Popen(
            [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", f"--port={port}", "--ip=127.0.0.1",
             f"--IdentityProvider.token={token}", f"--ServerApp.root_dir={work}", "--LabApp.expose_app_in_browser=True",
             "--ServerApp.port_retries=0"],
            env=environment, stdout=log, stderr=subprocess.STDOUT,
        )
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(240):
            if server.poll() is not None:
                pytest.fail(f"JupyterLab did not start:\n{(home / 'lab.log').read_text()[-3000:]}")
            try:
                urllib.request.urlopen(f"{url}/api?token={token}", timeout=2)
                break
            except OSError:
                time.sleep(0.25)
        yield url, token, work
    finally:
        server.terminate()
        try:
            server.wait(10)
        except subprocess.TimeoutExpired:  # it waits for a kernel that was only starting
            server.kill()


class Lab:
    """A page with JupyterLab, driven through its own commands."""

    def __init__(self, page, url, token, work):
        self.page, self.url, self.token, self.work = page, url, token, work
        self.problems = []
        page.on("pageerror", lambda error: self.problems.append(f"page error: {error} {error.stack}"))
        page.on("request", self._watch)

    def _watch(self, request):
        if not request.url.startswith((self.url, self.url.replace("http", "ws"), "data:", "blob:")):
            self.problems.append(f"request to {request.url}")

    def open(self, path=""):
        self.page.goto(f"{self.url}/lab?token={self.token}&reset")
        self.page.wait_for_function("window.jupyterapp !== undefined")
        self.page.evaluate("window.jupyterapp.restored")
        if path:
            self.command("docmanager:open", {"path": path})

    def write(self, path, *cells):
        """A notebook of code cells."""
        kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3"}}
        notebook = new_notebook(cells=[new_code_cell(cell) for cell in cells], metadata=kernel)
        (self.work / path).write_text(nbformat.writes(notebook))

    def command(self, name, arguments=None):
        return self.page.evaluate(
            "([name, args]) => window.jupyterapp.commands.execute(name, args).then(() => null)", [name, arguments or {}]
        )

    def run(self, path):
        """Open a notebook and run all of it."""
        self.open(path)
        self.page.evaluate(
            "() => window.jupyterapp.shell.currentWidget.context.ready"
            ".then(() => window.jupyterapp.shell.currentWidget.sessionContext.ready)"
        )
        self.command("notebook:run-all-cells")
        self.page.wait_for_function(
            """() => {
              const cells = window.jupyterapp.shell.currentWidget.content.widgets.filter(c => c.model.type === 'code');
              return cells.every(c => c.model.executionCount)
                || cells.some(c => c.model.outputs.toJSON().some(o => o.output_type === 'error')) }""",
            timeout=120_000,
        )
        errors = self.page.evaluate(
            """() => window.jupyterapp.shell.currentWidget.content.widgets.filter(c => c.model.type === 'code').flatMap(
              c => c.model.outputs.toJSON()).filter(o => o.output_type === 'error').map(o => o.evalue)"""
        )
        assert errors == []

    def kernel(self, code):
        """Run code in the notebook's kernel; what it prints."""
        return self.page.evaluate(
            """code => new Promise(resolve => {
              const kernel = window.jupyterapp.shell.currentWidget.sessionContext.session.kernel;
              let text = '';
              const future = kernel.requestExecute({ code, store_history: false });
              future.onIOPub = m => {
                if (m.header.msg_type === 'stream') text += m.content.text;
                if (m.header.msg_type === 'error') text += m.content.ename + ': ' + m.content.evalue;
              };
              future.done.then(() => resolve(text.trim()));
            })""",
            code,
        )


@pytest.fixture(scope="session")
def browser(chromium):
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=chromium, headless=True, args=FLAGS)
        yield found
        found.close()


@contextmanager
def opened(browser, lab):
    """JupyterLab in a page of its own, in which no error and no request to elsewhere may occur."""
    context = browser.new_context(viewport={"width": 1400, "height": 1000}, accept_downloads=True)
    found = Lab(context.new_page(), *lab)
    yield found
    context.close()
    assert found.problems == []


@pytest.fixture
def jupyter(browser, lab):
    with opened(browser, lab) as found:
        yield found
