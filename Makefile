# Each target makes the virtual environment first if need be; after that nothing needs a network.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed

# Two test processes with one thread each: torch's own threads would only fight over the cores.
TEST_ENV := OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false

# Processes beside each other in `make reproduce`; each has one thread.
JOBS ?= 2

.PHONY: venv demo test test-slow reproduce bench lint

venv: $(STAMP)

$(STAMP): pyproject.toml
	@echo "installing into .venv; the first time this takes some minutes"
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade "setuptools>=80"
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	touch $@

demo: venv
	$(BIN)/diffkit demo --output demo --overwrite

test: venv
	$(TEST_ENV) $(BIN)/python -m pytest -q -n 2

test-slow: venv
	$(TEST_ENV) $(BIN)/python -m pytest -q -m slow

reproduce: venv
	test -d .build/emoji/t2i-128 || $(BIN)/python scripts/build_assets/emoji.py --output .build/emoji
	$(BIN)/python scripts/build_assets/gates.py
	for script in scripts/reproduce/*.py; do \
		$(BIN)/python $$script --jobs $(JOBS) --results outputs/reproduce || exit 1; \
	done

bench: venv
	mkdir -p outputs/bench
	$(BIN)/python scripts/bench/training.py --output outputs/bench
	$(BIN)/python scripts/bench/generation.py --output outputs/bench
	$(BIN)/python scripts/bench/evaluation.py --output outputs/bench
	$(BIN)/python scripts/bench/protection.py --output outputs/bench
	$(BIN)/python scripts/bench/protect_command.py --output outputs/bench
	$(BIN)/python scripts/bench/objectives.py --output outputs/bench
	$(BIN)/python scripts/bench/few_step.py --output outputs/bench

lint: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
