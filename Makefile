# Everything here needs only Python, make and git; the first target that runs sets up .venv.
PYTHON ?= python3
# The torch requirement to install, e.g. TORCH=torch==2.13.0 for one particular build.
TORCH ?= torch
BIN := .venv/bin

.PHONY: demo test test-integration test-gpu gpu-bundle docs cards quality style clean
.DELETE_ON_ERROR:

# From a fresh clone: generate images, align, and show what it changed on held-out real images.
demo: .venv/installed
	$(BIN)/gmail-hf demo --output_dir outputs/demo

test: .venv/installed
	$(BIN)/python -m pytest -n 2 --dist loadfile

# Tests that start processes, servers or compilers, or run whole commands.
test-integration: .venv/installed
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "integration and not slow"

# On a machine with a CUDA device; elsewhere these tests are skipped.
test-gpu: .venv/installed
	$(BIN)/python -m pytest -m gpu

# benchmarks/gpu/wheels: what a GPU machine without a network may lack.
gpu-bundle: .venv/installed
	$(BIN)/python benchmarks/gpu/bundle.py

# The site, in outputs/site; look at it by: python -m http.server --directory outputs/site
docs: .venv/docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

# Renders model_cards/ from the configs and the files that runs left there.
cards: .venv/installed
	$(BIN)/python model_cards/render.py

quality: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

style: .venv/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Installed when missing or older than pyproject.toml.
.venv/installed: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "gmail-hf needs Python 3.10 or newer")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install "$(TORCH)"
	$(BIN)/python -m pip install --editable ".[test]"
	touch $@

.venv/docs: .venv/installed
	$(BIN)/python -m pip install --quiet --editable ".[docs]"
	touch $@

clean:
	rm -rf .venv .pytest_cache .ruff_cache build dist outputs src/*.egg-info
