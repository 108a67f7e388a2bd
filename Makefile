# demo: a video from the built-in checkpoint.  test: all tests.  Both create .venv and install at first use.
# gpu: tests and speeds on an NVIDIA GPU, with PYTHON as it is, nothing installed; BUDGET=530 seconds in all, ONLY=some of
#      tests,kernels,stages,tune,latency,demo. OUT=folder gets results.tar.gz; COMMIT names a copy without git.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
ONLY ?= tests,kernels
BUDGET ?= 530

.PHONY: demo test chromium gpu clean

demo: $(VENV)/installed
	mkdir -p out
	$(BIN)/python -m runtime generate "a red ball rolls left over green grass" -o out/demo.mp4 --seed 7

test: $(VENV)/installed-tests chromium
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --durations=15

# The page's tests drive Debian's Chromium; where it is missing and cannot be installed they are skipped, and say so.
chromium:
	@command -v chromium >/dev/null || { command -v apt-get >/dev/null && [ "$$(id -u)" = 0 ] && \
	  timeout 300 sh -c 'apt-get -qq update && apt-get -qq install -y --no-install-recommends chromium' >/dev/null 2>&1; } || \
	  echo "chromium is missing and cannot be installed here: the tests of the page are skipped"

gpu:
	$(PYTHON) tools/gpu.py --only $(ONLY) --budget $(BUDGET)

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "dit-runtime needs Python 3.11 or newer, and $(PYTHON) is $$($(PYTHON) --version); run: make PYTHON=/path/to/python3.11"; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/installed: $(VENV)/bin/python pyproject.toml setup.py constraints.txt
	$(BIN)/pip install --disable-pip-version-check -q -c constraints.txt setuptools pybind11
	$(BIN)/pip install --disable-pip-version-check -q -c constraints.txt torch
	$(BIN)/pip install --disable-pip-version-check -q -c constraints.txt --no-build-isolation -e .
	touch $@

$(VENV)/installed-tests: $(VENV)/installed
	$(BIN)/pip install --disable-pip-version-check -q -c constraints.txt --no-build-isolation -e ".[test]"
	@for version in 2.2.0 2.54.0; do \
	  $(BIN)/pip install --disable-pip-version-check -q --target $(VENV)/clients/openai-$$version openai==$$version \
	    || echo "the Python client openai $$version could not be had; its test is skipped"; done
	@for version in 6.49.0 7.57.0; do \
	  npm install --silent --no-audit --no-fund --prefix $(VENV)/clients/openai-js-$$version openai@$$version \
	    || echo "the JavaScript client openai $$version could not be had; its test is skipped"; done
	touch $@

clean:
	rm -rf $(VENV) build out *.egg-info
