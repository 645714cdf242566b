# Everything is kept in .venv; `make demo` and `make test` set it up by themselves.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
# What DeepSpeed compiles at first use: of this checkout alone, so that no other's build is waited for.
export TORCH_EXTENSIONS_DIR ?= $(CURDIR)/.venv/torch_extensions

.PHONY: help setup demo test test-faults test-slow test-gpu check docs picture format bench bench-gpu bench-quick clean

help:
	@echo "make demo     set up, train the digits, write a report"
	@echo "make test     set up, run the tests"
	@echo "make test-faults  all tests that inject faults"
	@echo "make test-slow    the tests that make test leaves out, for they take long"
	@echo "make check    lint, types, layers, generated pages"
	@echo "make docs     build the manual into site/, strictly"
	@echo "make picture  take the picture of the demo's report again"
	@echo "make format   format the code"
	@echo "make bench    all benchmarks, their tables into benchmarks/README.md (hours)"
	@echo "make bench-gpu  the benchmark of one GPU, its tables into benchmarks/README.md (ten minutes)"
	@echo "make bench-quick  all benchmarks, as a smoke test in minutes"
	@echo "make clean    remove .venv and what the demo wrote"

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt 'torch==2.13.0'
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[all,bench,docs,dev]'
	touch $(READY)

demo: $(READY)
	rm -rf runs/demo
	$(BIN)/distgrow plan configs/digits.yaml run.dir=runs/demo
	$(BIN)/distgrow train configs/digits.yaml run.dir=runs/demo
	$(BIN)/distgrow report runs/demo

test: $(READY)
	$(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not slow"

# Tests of Ray clusters need a process of their own, beside which the others run: at the niceness of 15 that Ray gives
# its workers they would starve there.
test test-faults test-slow: export RAY_worker_niceness := 0

# $(call beside_ray,MARKS): the tests of Ray with these marks in one process, the others in two beside it.
define beside_ray
	$(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder -m "$(1) and not ray" & others=$$!; \
	$(BIN)/pytest -m "$(1) and ray"; ray=$$?; wait $$others && exit $$ray
endef

test-faults: $(READY)
	$(call beside_ray,fault)

test-slow: $(READY)
	$(call beside_ray,slow)

test-gpu: $(READY)
	$(BIN)/pytest -m gpu

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --warnings
	$(BIN)/lint-imports
	$(BIN)/python docs/generate.py --check

# Without network; search works where site/ is served: .venv/bin/mkdocs serve.
docs: $(READY)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

picture: demo
	$(BIN)/python docs/picture.py runs/demo

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(READY)
	$(BIN)/python benchmarks/suite.py

bench-gpu: $(READY)
	$(BIN)/python benchmarks/suite.py --only gpu

bench-quick: $(READY)
	$(BIN)/python benchmarks/suite.py --quick

clean:
	rm -rf .venv runs/demo
