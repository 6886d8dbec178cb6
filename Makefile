# make demo: set up, run the embedded study, say where the report is.   make test: set up, run the tests.   make docs: the site.
PYTHON ?= python3
BIN := .venv/bin
# one thread a process: the tests run two processes side by side
TEST_ENV := OMP_NUM_THREADS=1 CUDA_VISIBLE_DEVICES=

.PHONY: demo test lint docs data clean

demo: .venv/.ready
	$(BIN)/vlmq-study study=demo

test: .venv/.ready
	$(TEST_ENV) $(BIN)/python -m pytest -n 2 --dist worksteal

lint: .venv/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# the documentation as a site, in build/site; a warning is an error
docs: .venv/.ready
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

# the training drawings, needed only to pre-train the embedded models again; npm is needed for this alone
data: .venv/.ready
	mkdir -p data/artwork && cp scripts/artwork/package.json data/artwork/
	npm install --prefix data/artwork --no-audit --no-fund
	$(BIN)/python -m pip install --quiet --editable '.[artwork]'
	$(BIN)/python scripts/render_concepts.py data/artwork/node_modules data/concepts

clean:
	rm -rf .venv build *.egg-info

.venv/.ready: requirements.lock pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed: make PYTHON=/path/to/it" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --requirement requirements.lock
	$(BIN)/python -m pip install --quiet --no-deps --editable .
	touch $@
