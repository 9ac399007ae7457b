"""Every README block and every notebook runs."""

import re
from pathlib import Path

import nbclient
import nbformat
import pytest

from tests.pictures import FOLDER, pictures

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def test_readme_blocks_run_in_order(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len(blocks) >= 4
    scope = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), scope)
    assert (tmp_path / "gpt.svg").exists()


def test_readme_shows_the_code_that_is_written():
    (shown,) = re.findall(r"```py\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert shown.strip() in (ROOT / "tests" / "golden" / "gpt.txt").read_text()


def test_readme_pictures_are_up_to_date():
    named = re.findall(r'(?:src|srcset)="docs/pictures/([^"]+)"', (ROOT / "README.md").read_text())
    drawn = pictures()
    assert sorted(named) == sorted(drawn)
    for name, text in drawn.items():
        assert (FOLDER / name).read_text() == text, f"{name} is out of date: make pictures, and look at it"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_notebook_runs(path, tmp_path):
    notebook = nbformat.read(path, as_version=4)
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            assert output.output_type != "error"
