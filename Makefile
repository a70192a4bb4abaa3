# `make demo` and `make test` set themselves up in .venv (Python 3.11 or newer, nothing else needed) and run.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo test lint plugin clean

demo: $(VENV)/.installed  ## both arms of the two-task comparison, a few minutes on two cores
	$(BIN)/python examples/fashion_two_task.py --quick

test: $(VENV)/.installed-dev  ## the test suite, on two processes
	$(BIN)/python -m pytest -n 2

lint: $(VENV)/.installed-dev  ## what CI checks beside the tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

plugin: $(VENV)/.installed  ## wheels of this project and of a third-party plugin, used in an environment of their own
	bash tests/external_plugin/check.sh $(BIN)/python

clean:  ## remove the virtual environment
	rm -rf $(VENV)

$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; found " + sys.version.split()[0] + "; set PYTHON=python3.11 or the like")'
	@echo "Setting up $(VENV): PyTorch and friends, a few minutes the first time ..."
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "pip>=25.1"
	PYTHONWARNINGS=ignore $(BIN)/python -m pip install --quiet --constraint constraints.txt --editable .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --group dev
	@touch $@
