# Two commands do everything on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test test-long check lint crash fuzz clean

.venv/installed: pyproject.toml constraints.txt
	@echo "making .venv, which takes a few minutes"
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test]'
	touch $@

demo: .venv/installed
	$(BIN)/python examples/demo.py

test: .venv/installed
	OMP_NUM_THREADS=1 $(BIN)/pytest -q -n 2 --dist worksteal -m "not long"

# What `make test` leaves to CI for its minutes: the memory of large models, kernels compiled for GPUs other than Hopper.
test-long: .venv/installed
	OMP_NUM_THREADS=1 $(BIN)/pytest -q -n 2 --dist worksteal -m long

# Every shipped recipe on both bundled models, against the committed baseline.
check: .venv/installed
	mkdir -p build
	OMP_NUM_THREADS=1 $(BIN)/compressor check --baseline recipes/baselines.json --jobs 2 --markdown build/check.md

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy -p compressor

# Fifty kill -9 / resume rounds; the suite has a short version.
crash: .venv/installed
	$(BIN)/python benchmarks/crash.py --rounds 50

# Broken input, a hundred cases of each kind; the suite has a short version.
fuzz: .venv/installed
	$(BIN)/python benchmarks/fuzz.py

clean:
	rm -rf build .pytest_cache .mypy_cache .ruff_cache
