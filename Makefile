# make demo   sets everything up and trains a pruned network and a structured-prediction model on embedded data
# make test   sets everything up and passes the tests, on every supported Python that this machine has
# make docs   builds the site into build/docs; a name or a link that is not there is an error
PYTHON ?= python3
NEWEST ?= $(shell .ci/find-python 3.12)
JOBS ?= $(shell nproc 2>/dev/null || echo 2)

.PHONY: demo docs test test-oldest test-newest lint format clean
.DELETE_ON_ERROR:

demo: .venv/installed
	.venv/bin/python -m experiments run snip
	.venv/bin/python -m experiments run denoise
	.venv/bin/python -m experiments report

test: lint test-oldest $(if $(NEWEST),test-newest) docs

# The newest JAX comes with Python 3.12 and runs everything. The oldest, with 3.11, then runs the contract: imports,
# doctests, batteries, one exact check a method; with one interpreter only, everything runs on that pair.
PYTEST = -m pytest -q -n $(JOBS) --dist worksteal
test-oldest: .venv/installed
	.venv/bin/python $(PYTEST) $(if $(NEWEST),-m contract --ignore=tests/experiments --ignore=tests/benchmarks)

test-newest: .venv-3.12/installed
	.venv-3.12/bin/python $(PYTEST) $(if $(wildcard tests/budgets.json),--check-budgets)

DOCS = $(if $(NEWEST),.venv-3.12,.venv)
docs: $(DOCS)/docs-installed
	NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/python -m mkdocs build --config-file docs/mkdocs.yml

lint: .venv/installed
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/pyrefly check --output-format min-text --python-interpreter-path .venv/bin/python

format: .venv/installed
	.venv/bin/ruff check --fix .
	.venv/bin/ruff format .

.venv/installed: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "jaxlib_methods needs Python 3.11 or newer, and $(PYTHON) is " + sys.version.split()[0] + "; run: make PYTHON=/path/to/python3.11 $(MAKECMDGOALS)")'
	$(PYTHON) -m venv .venv
	.venv/bin/pip install --quiet --editable '.[experiments,test]'
	touch $@

.venv-3.12/installed: pyproject.toml
	$(NEWEST) -m venv .venv-3.12
	.venv-3.12/bin/pip install --quiet --editable '.[experiments,test]'
	touch $@

%/docs-installed: %/installed
	$*/bin/pip install --quiet --editable '.[docs]'
	touch $@

clean:
	rm -rf .venv .venv-3.12 build dist *.egg-info
