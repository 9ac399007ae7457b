# make lab    set everything up and open JupyterLab on the first notebook (ARGS=--no-browser without a screen)
# make test   set everything up and run all tests: Python, TypeScript, browser
# make bench  the benchmarks, as ratios in one run
# make zoo    every model family of transformers, traced, verified and drawn: docs/families.md (about an hour of one core)
#
# TORCH= chooses another torch, e.g. TORCH="torch --index-url https://download.pytorch.org/whl/cu126"; the default is
# whatever the machine's pip knows within the range, a CPU build where it knows one. PYTHON= chooses the Python.

PYTHON ?= python3
TORCH ?= "torch>=2.6,<2.14"
VENV ?= .venv
BIN := $(VENV)/bin
ARGS ?=
ROOT := $(if $(filter 0,$(shell id -u)),--allow-root)

.PHONY: lab test browser check bench zoo pictures clean

lab: $(VENV)/installed
	$(BIN)/jupyter lab $(ROOT) $(ARGS) notebooks/01_draw.ipynb

# One thread for each process: two processes of one take half the time of one process of two. In the browser one after another.
# ARGS may leave nothing for one of the two: 5 is "no tests were selected".
test: check browser
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 8 --dist loadfile -m "not browser" $(ARGS) || [ $$? -eq 5 ]
	$(BIN)/python -m pytest -m browser $(ARGS) || [ $$? -eq 5 ]

# A browser for the tests: the machine's own, else Debian's package, else the one that playwright downloads.
browser: $(VENV)/test-tools
	@command -v chromium || command -v chromium-browser || command -v google-chrome \
	  || { [ -n "$(ROOT)" ] && command -v apt-get >/dev/null && apt-get update -qq \
	       && apt-get install -y -qq --no-install-recommends chromium librsvg2-bin fonts-dejavu-core >/dev/null; } \
	  || $(BIN)/playwright install --with-deps chromium

check: $(VENV)/installed $(VENV)/test-tools
	cd js && npm run --silent check && npm run --silent test
	$(BIN)/ruff check --no-cache .
	$(BIN)/lint-imports --no-cache
	$(BIN)/pyright --pythonpath $(BIN)/python

bench: $(VENV)/installed $(VENV)/test-tools
	$(BIN)/uv pip install --quiet --python $(BIN)/python --group bench
	$(BIN)/python -m tests.bench $(ARGS)

zoo: $(VENV)/installed $(VENV)/test-tools
	$(BIN)/python -m tests.families $(ARGS)

pictures: $(VENV)/installed $(VENV)/test-tools
	$(BIN)/python -m tests.pictures

clean:
	rm -rf $(VENV) js/node_modules js/lib circuitlab/labextension circuitlab/widgets/static

$(VENV)/torch:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -c "import torch" 2>/dev/null || $(BIN)/pip install --quiet $(TORCH)
	$(BIN)/pip install --quiet uv
	touch $@

js/node_modules: js/package-lock.json
	cd js && npm ci --no-audit --no-fund --loglevel=error
	touch $@

# A development install: Python is editable, the JavaScript is copied to where JupyterLab looks for it.
$(VENV)/installed: $(VENV)/torch js/node_modules pyproject.toml $(wildcard js/src/*) circuitlab/diagram/theme.json
	cd js && npm run --silent build
	$(BIN)/uv pip install --quiet --python $(BIN)/python "hatchling>=1.27" "hatch-jupyter-builder>=0.9" editables
	HATCH_JUPYTER_BUILDER_SKIP_NPM=1 $(BIN)/uv pip install --quiet --python $(BIN)/python --no-build-isolation --editable ".[lab]"
	touch $@

$(VENV)/test-tools: $(VENV)/installed
	$(BIN)/uv pip install --quiet --python $(BIN)/python --group test
	touch $@
