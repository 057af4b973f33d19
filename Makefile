PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
OUT ?= runs/local

.PHONY: install run test test-long bench-latency bench-loader bench-probe bench-sketch bench-worker fuzz compare-evidence lint types imports generated wheel check clean

install: $(STAMP)

# One environment with pinned versions; made anew only when the pins or the project's own needs change.
# Every file is held against the hashes in requirements.lock, but for torch and what it alone needs:
# which build of it there is depends on the machine, so it is installed by its pinned version.
$(STAMP): constraints.txt requirements.lock tests/integration/torchtitan.lock pyproject.toml
	$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if v >= (3, 11) else "Headrace needs Python 3.11 or newer, this is %d.%d: make PYTHON=python3.11 $(MAKECMDGOALS)" % v[:2])'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes --no-deps -r requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check torch -c constraints.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes --no-deps -r tests/integration/torchtitan.lock
	touch $(STAMP)

# The whole system on this machine, on real text; ends with a short report. A run that is there
# already is moved aside, unless ARGS says to go on with it.
run: install
	$(BIN)/headrace run --out $(OUT) $(if $(findstring --resume,$(ARGS)),,--fresh) $(ARGS)

# Everything but the tests marked `long`: first the tests within one process, two at a time, then
# those that start processes or inject faults, one by one. With ARGS one run of what they choose.
SLOW := --durations 20 --durations-min 5
test: install
ifdef ARGS
	$(BIN)/python -m pytest -m 'not long' $(SLOW) $(ARGS)
else
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m 'not (long or slow or faults)' -n 2 --dist worksteal --timeout 240 $(SLOW)
	$(BIN)/python -m pytest -m '(slow or faults) and not long' $(SLOW)
endif

# The tests that take minutes, with what they print; `make faults` runs those that inject faults.
test-long: install
	$(BIN)/python -m pytest -m 'long and not faults' $(ARGS)

# The fault suite, some 20 minutes: every test that injects faults, counted. Writes
# build/faults/table.md, a line for each row of the table of faults and test.
.PHONY: faults
faults: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m faults --timeout 600 --fault-table build/faults/table.md $(ARGS)

# An hour of a run under random faults, ARGS='--seconds N --seed S': memory, descriptors and threads
# of each process, then the offline checks. Writes build/soak/soak.json, samples.jsonl, soak.png.
.PHONY: soak
soak: install
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.faults.soak $(ARGS)

# The hashes of all files of the pinned releases, as the package index has them, looked up anew after
# a change of the pins. Writes requirements.lock, and one for torchtitan; the tool is in an
# environment of its own.
LOCKED := --quiet --no-deps --generate-hashes --python-version 3.11 --no-header --no-annotate
.PHONY: lock
lock: .venv-lock/.installed
	.venv-lock/bin/uv pip compile constraints.txt $(LOCKED) --no-emit-package torch --no-emit-package atheris --output-file requirements.lock
	.venv-lock/bin/uv pip compile tests/integration/torchtitan.txt $(LOCKED) --output-file tests/integration/torchtitan.lock

.venv-lock/.installed:
	$(PYTHON) -m venv .venv-lock
	.venv-lock/bin/python -m pip install --quiet --disable-pip-version-check uv==0.13.9
	touch $@

# The pinned packages as a CycloneDX bill of materials. Writes build/sbom.json.
.PHONY: sbom
sbom: install
	$(BIN)/python -m tests.supply.sbom build/sbom.json

# The pinned packages against the advisories that are published; fails where one applies, and where
# none can be looked up. In an environment of its own.
.PHONY: audit
audit: .venv-audit/.installed
	.venv-audit/bin/pip-audit --requirement constraints.txt --no-deps --disable-pip --strict --progress-spinner off

.venv-audit/.installed:
	$(PYTHON) -m venv .venv-audit
	.venv-audit/bin/python -m pip install --quiet --disable-pip-version-check pip-audit==2.10.1
	touch $@

# The loaders that ours is measured beside, in an environment of their own.
.venv-bench/.installed: tests/benchmarks/peers.txt
	$(PYTHON) -m venv .venv-bench
	.venv-bench/bin/python -m pip install --quiet --disable-pip-version-check -r tests/benchmarks/peers.txt
	touch $@

# Tokens a second and CPU time of our loader and five others, in turns, on the same work: some
# minutes. Writes build/bench/loader.json.
bench-loader: install .venv-bench/.installed
	$(BIN)/python -m tests.benchmarks.bench_loader $(ARGS)

# Text tokenized on the way, and what a jump of the mixture costs. Writes build/bench/worker.json.
bench-worker: install
	$(BIN)/python -m tests.benchmarks.bench_worker

# What the gradient probe costs a step, on against off in turns. Writes build/bench/probe.json;
# ARGS='--device cuda' measures a GPU.
bench-probe: install
	$(BIN)/python -m tests.benchmarks.bench_probe $(ARGS)

# From a step's end to the sealed plan, connect to the first batch. Writes build/bench/latency.json.
bench-latency: install
	$(BIN)/python -m tests.benchmarks.bench_latency $(ARGS)

# How far the probe's sketches are from exact gradients. Writes build/bench/sketch.json.
bench-sketch: install
	$(BIN)/python -m tests.benchmarks.bench_sketch $(ARGS)

# The comparison of policies that the README quotes: its tables from the kept records, and whatever
# trial is missing (that needs the corpus that the comparison's data.source names).
compare-evidence: install
	mkdir -p build/compare
	test -d build/compare/main || cp -r tests/learning/evidence/main build/compare/main
	$(BIN)/headrace compare build/compare/main $(ARGS)

# Coverage-guided fuzzing of all that reads bytes from elsewhere, COUNT executions of each target.
COUNT ?= 20000
fuzz: install
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[fuzz]'
	$(BIN)/python -m tests.fuzz --count $(COUNT) $(ARGS)

lint: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: install
	$(BIN)/mypy

imports: install
	$(BIN)/lint-imports

generated: install
	$(BIN)/python -m protos.generate --check

# Build the wheel, install it into a clean environment, use it outside the tree.
wheel: install
	$(BIN)/python tests/wheel/check.py

check: lint types imports generated wheel

clean:
	rm -rf build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache

# What a decision costs the controller, with growing numbers of domains and ranks. Writes
# build/bench/decision.json.
.PHONY: bench-decision
bench-decision: install
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.benchmarks.bench_decision

# Time and memory that it takes to read a long ledger. Writes build/bench/reading.json.
.PHONY: bench-reading
bench-reading: install
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.benchmarks.bench_reading $(ARGS)

# The trackers that `log_fn`s write to, in an environment of their own beside ours.
.venv-trackers/.installed: tests/integration/trackers.txt
	$(PYTHON) -m venv .venv-trackers
	.venv-trackers/bin/python -m pip install --quiet --disable-pip-version-check -r tests/integration/trackers.txt
	touch $@

# The `log_fn`s for TensorBoard, W&B, Trackio and MLflow, on the real libraries, without a network.
.PHONY: test-trackers
test-trackers: install .venv-trackers/.installed
	PYTHONPATH=$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))') .venv-trackers/bin/python -m pytest tests/integration/test_trackers.py $(ARGS)

# What Ray's metrics endpoint needs beside Ray, in an environment of its own beside ours.
.venv-ray-metrics/.installed: tests/integration/ray_metrics.txt
	$(PYTHON) -m venv .venv-ray-metrics
	.venv-ray-metrics/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -r tests/integration/ray_metrics.txt
	touch $@

# Loader workers' figures at the metrics endpoint of a real Ray.
.PHONY: test-ray-metrics
test-ray-metrics: install .venv-ray-metrics/.installed
	PYTHONPATH=$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))') .venv-ray-metrics/bin/python -m pytest tests/integration/test_ray_metrics.py $(ARGS)

# The live page in a real Chromium, with what it costs the controller; installs Chromium where
# apt-get can, and is skipped where there is none.
.PHONY: test-page
test-page: install
	@command -v chromedriver >/dev/null || { apt-get update -qq && apt-get install -y -qq chromium chromium-driver; } || true
	$(BIN)/python -m pytest tests/integration/test_page_browser.py tests/integration/test_page_process.py --timeout 600 -rs $(ARGS)

# CPU time that a watched page takes of its controller. Writes build/bench/page.json.
.PHONY: bench-page
bench-page: install
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.benchmarks.bench_page $(ARGS)
