# Set-up, tests and measurements. `make help` lists the targets. Everything goes through .venv; on a fresh
# Debian 12 run as root, and the Debian packages are installed too.

VENV := .venv
PYTHON := $(VENV)/bin/python
PACKAGE := $(shell find lazyfs -name '*.py' -o -name py.typed) $(wildcard scripts/*)
ARGS ?=

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup demo test lint bench bench-against hellobench hellobench-quick hellobench-starts hellobench-against clean

## help: list the targets
help:
	@sed -n 's/^## //p' Makefile | column -t -s: 2>/dev/null || sed -n 's/^## //p' Makefile

## setup: install Debian packages, the virtual environment, lazyfs and its commands
setup: $(VENV)/.lazyfs
	@tools/install-commands

## demo: build an image, push it to a local registry, mount it lazily, run it, compare with a full pull
demo: setup
	$(PYTHON) -m benchmarks.demo $(ARGS)

## test: run all tests; ARGS are pytest's (make test ARGS="-k cache -x")
test: setup
	$(PYTHON) -m tests.realimages
	$(PYTHON) -m pytest $(ARGS)

## lint: ruff and mypy --strict
lint: setup
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy

## bench: measure the README's table; writes benchmarks/results
bench: setup
	$(PYTHON) -m benchmarks.table $(ARGS)

## bench-against: this build against another checkout's, side by side: make bench-against BEFORE=DIR
bench-against: setup
	$(PYTHON) -m benchmarks.against $(BEFORE) $(ARGS)

## hellobench: how soon containers of all workloads are useful, against containerd and umoci (hours; see benchmarks/README.md)
hellobench: setup
	$(PYTHON) -m benchmarks.hellobench run --link loopback --link lan --link wan --link home $(ARGS)
	$(PYTHON) -m benchmarks.hellobench long
	$(PYTHON) -m benchmarks.hellobench report

## hellobench-quick: the same for six workloads and one sample, in some minutes; writes hellobench-quick/
hellobench-quick: setup
	rm -rf hellobench-quick
	$(PYTHON) -m benchmarks.hellobench run --quick --samples 1 --results hellobench-quick/results.jsonl $(ARGS)
	$(PYTHON) -m benchmarks.hellobench report --results hellobench-quick/results.jsonl

## hellobench-starts: cold starts with packs, with profiles and without, over LAN and WAN (hours; with BEFORE=DIR another build's, too)
hellobench-starts: setup
	$(PYTHON) -m benchmarks.hellobench run --link lan,wan --operation deployment --samples 3 \
		--mode ctr,lazyfs,lazyfs-noindex,lazyfs-pack,lazyfs-profile $(if $(BEFORE),--before $(BEFORE)) \
		--results hellobench-starts/results.jsonl $(ARGS)
	$(PYTHON) -m benchmarks.hellobench report --results hellobench-starts/results.jsonl

## hellobench-against: cold starts of three images held back from tuning, against those of another checkout (BEFORE=DIR)
hellobench-against: setup
	$(PYTHON) -m benchmarks.hellobench run --held-back --link loopback,lan,wan --operation deployment --samples 3 \
		--mode lazyfs,lazyfs-pack,lazyfs-profile --before $(BEFORE) --results hellobench-against/results.jsonl $(ARGS)
	$(PYTHON) -m benchmarks.hellobench report --results hellobench-against/results.jsonl

## clean: remove the virtual environment, the installed commands and caches
clean:
	tools/install-commands --remove
	rm -rf $(VENV) build *.egg-info hellobench-quick hellobench-starts hellobench-against .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamps, from the bottom up. /usr/bin/python3 rather than whichever comes first in PATH: the
# headers of python3-dev belong to it.
$(VENV)/.debian: debian-packages.txt tools/install-debian-packages
	tools/install-debian-packages
	mkdir -p $(VENV)
	touch $@

$(VENV)/.dependencies: setup.cfg pyproject.toml constraints.txt $(VENV)/.debian
	/usr/bin/python3 -m venv $(VENV)
	$(PYTHON) -m pip install -q --disable-pip-version-check -c constraints.txt setuptools wheel
	$(PYTHON) -m pip install -q --disable-pip-version-check --no-build-isolation -c constraints.txt '.[test,bench]'
	touch $@

# Not editable: an editable install adds an import hook to every start of the command. Compiled here,
# since an environment with PYTHONDONTWRITEBYTECODE would compile every module at every start. The
# build directory is removed because setuptools would install a module from it that is gone by now.
$(VENV)/.lazyfs: $(VENV)/.dependencies $(PACKAGE)
	rm -rf build *.egg-info
	$(PYTHON) -m pip install -q --disable-pip-version-check --no-build-isolation --no-deps --force-reinstall .
	rm -rf build *.egg-info
	env -u PYTHONDONTWRITEBYTECODE $(PYTHON) -m compileall -q $(VENV)/lib/python3*/site-packages
	touch $@
