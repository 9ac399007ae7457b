"""The package as it is installed: quick import, public names, what is in the wheel."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def run(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_import_loads_no_torch_and_no_numpy():
    heavy = "torch", "numpy", "scipy", "anywidget", "ipywidgets"
    assert run(f"import sys, circuitlab; print([m for m in {heavy} if m in sys.modules])") == "[]"


def test_drawing_and_representation_load_no_torch():
    code = "import sys, circuitlab.circuit, circuitlab.edit, circuitlab.display; print('torch' in sys.modules)"
    assert run(code) == "False"


def test_public_names_are_few_and_all_there():
    import circuitlab as cl

    assert len(cl.__all__) <= 15
    for name in cl.__all__:
        assert getattr(cl, name) is not None
    with pytest.raises(AttributeError, match="it has"):
        cl.tracee  # noqa: B018


def test_trace_stays_callable_after_its_package_is_imported():
    assert run(
        "import circuitlab as cl, circuitlab.trace.record, torch; "
        "print(cl.trace(torch.nn.Linear(2, 3), torch.zeros(1, 2)).title)"
    ) == "Linear"


def test_wheel_holds_both_javascript_bundles(tmp_path):
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", tmp_path, ROOT],
        check=True, capture_output=True,
    )
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert "circuitlab/widgets/static/widget.js" in names
    lab = [n for n in names if "/data/share/jupyter/labextensions/circuitlab/" in n]
    assert any(n.endswith("package.json") for n in lab)
    assert any(n.endswith("install.json") for n in lab)
    assert any("remoteEntry" in n for n in lab)
    assert "circuitlab/diagram/theme.json" in names
    assert not [n for n in names if n.endswith((".map", ".ts", ".ipynb", ".npz"))]
    assert wheel.stat().st_size < 600_000  # code alone: no data, no second copy of a bundle


def test_labextension_is_enabled():
    done = subprocess.run([sys.executable, "-m", "jupyter", "labextension", "list"], capture_output=True, text=True)
    lines = [line for line in (done.stdout + done.stderr).splitlines() if "circuitlab" in line]
    assert any("enabled" in line and "OK" in line for line in lines)
