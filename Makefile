# make demo: the whole walk on the digits data.   make test: all tests.   Both make .venv and install what they need, once.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# a process per core and one more (tests/conftest.py); the files of a process in our order
AT_ONCE := --numprocesses auto --dist loadfile --no-loadscope-reorder

.PHONY: demo test cover lab lint format bench bench-report journeys pictures gpu quick-preset triggers book clean
.DEFAULT_GOAL := help

help:
	@echo "make demo          run the notebooks on real digits and print the comparison"
	@echo "make test          run all tests"
	@echo "make cover         the same with coverage, which traces every line, torch's too, and takes longer"
	@echo "make lab           open the notebooks in JupyterLab"
	@echo "make lint          check style"
	@echo "make format        mend style"
	@echo "make bench         measure speed and memory against the naive formulas, and what sweeps and widgets cost"
	@echo "make bench-report  the former alone, into tests/benchmarks/README.md: on an idle machine, please"
	@echo "make journeys      the workbench's journeys in a real browser, ROUNDS=3 times in a row: red at the first that fails"
	@echo "make pictures      take the README's pictures of the workbench anew, and measure how long it lets one wait"
	@echo "make gpu           what a GPU is wanted for, in 9 minutes: DATA=cifar10-jpeg.tar.xz [INTO=runs/gpu] [SECONDS=520]"
	@echo "make quick-preset  the figures of the quick preset: seeds 23, 24, 25"
	@echo "make book          write notebooks/studies/README.md from its prose and its CSV files"
	@echo "make triggers      the figures of all fourteen triggers: a teacher each"

$(READY): pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit("abdlab needs Python 3.11 or later, this is " + sys.version.split()[0] + ": make PYTHON=python3.11 ...") if sys.version_info < (3, 11) else 0'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --upgrade pip
	$(BIN)/pip install --editable '.[test]'
	touch $@

demo: $(READY)
	$(BIN)/abdlab demo

test: $(READY) lint
	$(BIN)/python -m pytest $(AT_ONCE)

cover: $(READY)
	$(BIN)/python -m pytest $(AT_ONCE) --cov --cov-report=term

lab: $(READY)
	$(BIN)/jupyter lab notebooks/index.ipynb

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(READY)
	$(BIN)/python -m pytest tests/benchmarks -m benchmark -s

bench-report: $(READY)
	ABDLAB_BENCH_README=tests/benchmarks/README.md $(BIN)/python -m pytest tests/benchmarks -m benchmark -s

ROUNDS ?= 3
journeys: $(READY)
	for round in $$(seq $(ROUNDS)); do \
		echo "round $$round of $(ROUNDS)"; \
		$(BIN)/python -m pytest -x --durations=0 -m 'slow or benchmark' -k 'not queue' tests/test_browser.py tests/benchmarks/test_journeys.py tests/benchmarks/test_workbench_long.py || exit 1; \
	done

pictures: $(READY)
	$(BIN)/python tests/pictures.py
	$(BIN)/python tests/benchmarks/workbench_times.py

# not $(READY): a lent machine has torch and no network
INTO ?= runs/gpu
SECONDS ?= 520
gpu:
	$(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) tests/benchmarks/gpu.py run $(INTO) --data $(DATA) --seconds $(SECONDS)

quick-preset: $(READY)
	$(BIN)/abdlab run 05_abd_ablation -p run runs/quick-preset -p seeds '[23, 24, 25]'
	$(BIN)/abdlab report runs/quick-preset

triggers: $(READY)
	for name in badnet_grid badnet_sq blend sig trojan_wm trojan_3x3 trojan_8x8 cl l2_inv l0_inv smooth wanet image_patch weak adba; do \
		OMP_NUM_THREADS=1 $(BIN)/abdlab run 01_poisoning -p run runs/triggers/$$name -p trigger $$name -p device cpu || exit; \
	done
	$(BIN)/abdlab report runs/triggers

book: $(READY)
	$(BIN)/abdlab book

clean:
	rm -rf $(VENV)
