# make demo: set up, run the embedded study, say where the report is.   make test: set up, run the tests.   make docs: the site.
PYTHON ?= python3
BIN := .venv/bin
# one thread a process: the tests run two processes side by side
TEST_ENV := OMP_NUM_THREADS=1 CUDA_VISIBLE_DEVICES=

.PHONY: demo test lint docs data artwork clean

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

# Fashion-MNIST's training part, needed only to pre-train the embedded models again
data: .venv/.ready
	$(BIN)/python scripts/fetch_fashion_mnist.py data

# the drawings that the concepts' models are trained on; npm is needed for this alone
artwork: .venv/.ready
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
