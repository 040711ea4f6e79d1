# Two commands for a newcomer: `make demo` and `make test`. Each makes the environment first, once.

VENV ?= .venv
PYTHON ?= python3
# many processes import the same files: what is compiled of them is kept
RUN := PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 $(VENV)/bin/
READY := $(VENV)/.ready

.PHONY: demo test conformance conformance-full bench docs lint format clean

demo: $(READY)
	$(VENV)/bin/hf-arch demo $(DEMO)

test: $(READY)
	$(RUN)python -m pytest -n $${TEST_WORKERS:-auto} --dist loadfile --no-loadscope-reorder $(TESTS)

# ROWS=retnet measures one row. A quiet machine, please: what is found goes into the README. `hf-arch bench --quick` does not
bench: $(READY)
	$(VENV)/bin/hf-arch bench $(ROWS) --peers --output benchmarks/results $(BENCH)
	$(VENV)/bin/hf-arch bench --output benchmarks/results --render README.md

# transformers' own common tests, over the catalogue or over ROWS; they are downloaded once (10 MB)
conformance conformance-full: $(READY)
	$(RUN)python -m conformance $(if $(findstring full,$@),--full) --workers $${TEST_WORKERS:-auto} $(ROWS)

# Into site/, to be read from there or served; what mkdocs warns of, such as a link that leads nowhere, is an error
docs: $(READY)
	NO_MKDOCS_2_WARNING=1 $(RUN)python -m mkdocs build --strict

lint: $(READY)
	$(RUN)ruff check . && $(RUN)ruff format --check .

format: $(READY)
	$(RUN)ruff check --fix . && $(RUN)ruff format .

# torch first: with it there, nothing that follows pulls a CUDA build onto a machine without a GPU
$(READY): pyproject.toml setup.py
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "hf_arch needs Python 3.11 or newer; try: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --upgrade pip
	$(VENV)/bin/python -m pip install --quiet "torch==2.13.0"
	$(VENV)/bin/python -m pip install --quiet --editable ".[test,lint]"
	touch $(READY)

clean:
	rm -rf $(VENV) build dist *.egg-info hf_arch_demo hf_arch_bench hf_arch_evaluation site
