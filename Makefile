# make course   set everything up in .venv and run the course on the embedded base model
# make test     set up and run all checks
# make test-long  the long forms of the checks that have one, and their totals
# make test-platforms  the course and the package on Colab's kernel, widgets and libraries
# make lab      open the notebooks in JupyterLab
# make clean    remove .venv and caches, not runs/

PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
PIP := $(BIN)/python -m pip install --quiet --no-compile --disable-pip-version-check -c constraints/cpu-lock.txt

# Images that forbid bytecode would have each of the many processes compile the package and Colab's libraries again.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: course test test-package test-notebooks test-commands test-long test-platforms lab clean

course: $(READY)
	$(BIN)/python scripts/course.py

test: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	OMP_NUM_THREADS=1 $(MAKE) --no-print-directory -j2 test-package test-notebooks $(ALSO) test-commands

# Two at a time, a thread each: most tests keep one core busy and wait for files. What comes third follows the one that ends
# first, so that both cores are done at about the same time.
NOTEBOOKS := tests/test_notebooks.py tests/browser
COMMANDS := tests/test_launch.py tests/test_published_command.py tests/test_cli.py

test-package:
	$(BIN)/python -m pytest $(addprefix --ignore ,$(NOTEBOOKS) $(COMMANDS))

test-notebooks:
	$(BIN)/python -m pytest $(NOTEBOOKS)

test-commands:
	$(BIN)/python -m pytest $(COMMANDS)

# Hypothesis draws 200 examples where make test draws 25; a long form prints what it reached.
test-long: $(READY)
	HYPOTHESIS_PROFILE=long $(BIN)/python -m pytest -s -m "long or property"

# Builds Colab's versions in build/platforms beside .venv (once); SHORT=--short leaves the slower tests out.
test-platforms: $(READY)
	$(BIN)/python scripts/platforms.py $(SHORT)

lab: $(READY)
	$(BIN)/jupyter lab notebooks

clean:
	rm -rf .venv .pytest_cache .ruff_cache *.egg-info

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("Python 3.11 or newer is needed, this is %d.%d; try make PYTHON=python3.12" % sys.version_info[:2])'
	@echo "Setting up .venv (once; some minutes)"
	$(PYTHON) -m venv .venv

# Redone only when what is to be installed has changed. torch first: everything else builds on its version. pip would
# compile 18,000 modules; what every start imports is compiled by importing it, and the rest where it is used.
$(READY): pyproject.toml constraints/cpu-lock.txt | $(BIN)/python
	$(PIP) torch
	$(PIP) -e '.[lab,test]'
	@$(BIN)/python -c 'import lora_nb; [getattr(lora_nb, name) for name in lora_nb.__all__]'
	@touch $(READY)
