# The workshop's commands. Everything else needs only `make lab`.
# Needs: Python 3.11 to 3.13, make, and a package registry that can be reached.

PY := .venv/bin/python

# A Python counts only if it runs and is in range: name yours with make PYTHON=/path/to/python3.13
CANDIDATES := $(if $(PYTHON),$(PYTHON),$(PY) python3 python3.13 python3.12 python3.11 python)

.DEFAULT_GOAL := help
.PHONY: help setup lab fetch bundle run test test-fast test-browser test-colab test-gpu notebooks solutions colab slides figures \
  cheatsheet bench doctor lock clean

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup:  ## make .venv and install the pinned packages (seconds when nothing has changed)
	@for python in $(CANDIDATES); do \
	  if "$$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null; then \
	    exec "$$python" -I bootstrap.py; \
	  fi; \
	done; \
	echo "setup: no Python 3.11 to 3.13 that runs (tried: $(CANDIDATES)). Install one, or name yours: make PYTHON=/path/to/python3.13 $(or $(MAKECMDGOALS),setup)" >&2; \
	exit 1

# Loopback only, with its token; nothing is asked of the outside (updates, news, the extension list). The address
# it prints leads to the first notebook too, for those whose browser does not open by itself.
LAB_OPTIONS := --ServerApp.ip=127.0.0.1 --log-level=WARN \
  --ServerApp.root_dir=notebooks --LabApp.default_url=/lab/tree/00_start_here.ipynb \
  --LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate \
  --LabApp.news_url=None --LabApp.extension_manager=readonly

lab: setup  ## a quick check of this machine, then JupyterLab on the first notebook (without a network: BUNDLE=folder)
	@$(PY) -m workshop_utils doctor --quick || \
	  echo "The lab opens all the same; notebook 00 shows these checks again."
	@$(PY) -m jupyterlab $(LAB_OPTIONS) $$([ "$$(id -u)" = 0 ] && echo --allow-root)

fetch: setup  ## bring the language model of notebooks 07 and 08 into your cache, once (93 MB or 273 MB)
	@$(PY) -m workshop_utils fetch

bundle: setup  ## all that a room without a network needs, in one folder for a stick: TO=/media/stick/bundle
	@$(PY) -m bundle "$${TO:-build/bundle}"

run: setup  ## the whole series headless; the report is build/run/index.html
	@$(PY) notebooks/run_all.py

# What tests deadlines runs first, alone. Then make keeps two parts at work: the browser (it runs the learner's versions), the
# package, the exercises' checks, and the solutions, one notebook after the other. They often wait for processes to start,
# and have one thread each, or they would wait for each other at every matrix product. A process of pytest for each part,
# not pytest-xdist: where one of its workers dies, --dist loadfile waits for ever.
PYTEST := $(PY) -m pytest tests
CHECKS := tests/test_checks_reject_wrong.py
NOTEBOOK_TESTS := $(patsubst notebooks/src/%.py,test-%,$(wildcard notebooks/src/0*.py))

test: setup lint  ## every check, notebooks and browser included (about 30 minutes on two cores)
	@$(PYTEST) -m alone
	@$(MAKE) --no-print-directory --keep-going -o setup -j2 test-browser test-package test-checks $(NOTEBOOK_TESTS)

test-fast: setup lint  ## the checks that run no notebook and no browser (less than half the time of make test)
	@$(PYTEST) -m "alone and not browser and not slow"
	@OMP_NUM_THREADS=1 $(PYTEST) -m "not alone and not notebooks and not gpu and not slow"

test-browser: setup  ## JupyterLab in a real browser: every learner notebook, every widget (part of make test)
	$(call report,tests/browser)

# Two parts side by side, of about the same length. Each has a Python of its own: every notebook installs into it.
test-colab: setup  ## the Colab notebooks in a Python like Colab's, in an empty folder (about 9 minutes)
	@$(MAKE) --no-print-directory --keep-going -o setup -j2 test-colab-some test-colab-others

# Its own conftest.py alone, and no set-up: a machine with a GPU has torch, transformers and pytest, and perhaps no network.
test-gpu:  ## what needs a GPU, with .venv or your own torch: make test-gpu PYTHON=python3
	@$(firstword $(PYTHON) $(wildcard $(PY)) python3) -m pytest tests/gpu --confcutdir=tests/gpu -m gpu

SOME_ON_COLAB := 01_ or 04_ or 05_ or 06_ or 07_
.PHONY: test-colab-some test-colab-others
test-colab-some test-colab-others: export COLAB_ENV = $@
test-colab-some:
	$(call report,tests/on_colab -k "$(SOME_ON_COLAB)")

test-colab-others:
	$(call report,tests/on_colab -k "not ($(SOME_ON_COLAB))")

.PHONY: test-package test-checks $(NOTEBOOK_TESTS)
test-package:
	@OMP_NUM_THREADS=1 $(PYTEST) -m "not alone and not notebooks and not gpu" --ignore=$(CHECKS)

test-checks:
	$(call report,$(CHECKS))

$(NOTEBOOK_TESTS): test-%:
	$(call report,tests/test_notebooks.py -k $*)

# into a file: two reports on one screen cannot be read. Shown are the last lines, or all of it after a failure
report = @mkdir -p build; if OMP_NUM_THREADS=1 $(PY) -m pytest $(1) > build/$@.txt 2>&1; \
  then echo "$@:"; tail -3 build/$@.txt; else cat build/$@.txt; exit 1; fi

.PHONY: lint
lint: setup
	@$(PY) -m ruff check --quiet . && $(PY) -m ruff format --check --quiet . || \
	  { echo "lint: run .venv/bin/ruff check --fix . && .venv/bin/ruff format ." >&2; exit 1; }
	@$(PY) notebooks/build.py --check

notebooks: setup  ## build the learner and instructor versions from notebooks/src
	@$(PY) notebooks/build.py

solutions: setup  ## execute the solution versions and keep their outputs
	@$(PY) notebooks/build.py --execute
	@$(PY) docs/gallery.py

# make colab REPO=owner/name REF=tag: with badges; the folder's content then belongs into colab/ at that tag
colab: setup  ## the notebooks for Colab, in build/colab, each with the helper package inside
	@$(PY) notebooks/colab.py $(if $(REPO),--repo $(REPO)) $(if $(REF),--ref $(REF))

slides: setup  ## the decks of slides/ as HTML and PDF in build/slides, each slide measured (node and Chromium needed)
	@$(PY) slides/build.py

figures: setup  ## the slides' figures alone, in build/figures
	@$(PY) slides/figures.py

bench: setup  ## measure everything beside the libraries; the tables go to benchmarks/ and README (about 12 minutes, idle)
	@$(PY) benchmarks/run.py

cheatsheet: setup  ## print the cheat sheet: build/cheatsheet.pdf, one page
	@$(PY) -m workshop_utils.teaching.cheatsheet build/cheatsheet.pdf

doctor: setup  ## is this machine ready? Every failing line names its cure
	@$(PY) -m workshop_utils doctor

lock: setup  ## resolve requirements.lock anew (no addresses; CUDA packages come with torch where needed)
	@mkdir -p build
	@$(PY) -m uv pip compile pyproject.toml --extra lab --extra dev --universal --python-version 3.11 \
	  --no-header --no-annotate --no-emit-index-url --quiet --output-file build/requirements.all
	@{ echo "# Written by \`make lock\`: Python 3.11 to 3.13, any system. Without the CUDA packages: torch brings its own."; \
	  grep -vE '^(nvidia-|cuda-|triton)' build/requirements.all; } > requirements.lock
	@rm build/requirements.all

clean:  ## remove .venv, build/ and caches (downloaded packages stay in uv's cache)
	rm -rf .venv build *.egg-info .pytest_cache .ruff_cache notebooks/instructor slides/node_modules
	find . -name __pycache__ -prune -exec rm -rf {} +
