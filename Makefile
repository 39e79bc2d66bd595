# `make demo` and `make test` need Python 3.11 (or newer) and make; all else goes into .venv.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
INSTALLED := .venv/.installed
EXTRAS := 8bit,data,int8,judge,onnx,openvino,pixart,tensorboard,test,web

.PHONY: demo demo-build test test-lowest fuzz reliability benchmark ablation slow docs lint licenses audit clean
demo: $(INSTALLED)
	$(BIN)/asdm demo --out asdm-demo

test: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/pytest -q -n logical --maxprocesses 8 --dist loadfile

# The same tests with the oldest packages that pyproject.toml allows, in .venv-lowest. Linux, Python 3.11: gigabytes of torch.
LOWEST := .venv-lowest/bin
test-lowest:
	$(PYTHON) -m venv .venv-lowest
	$(LOWEST)/pip install --quiet uv
	$(LOWEST)/uv pip install --quiet --python $(LOWEST)/python --resolution lowest-direct -e ".[$(EXTRAS)]" -e packages/demo
	OMP_NUM_THREADS=1 $(LOWEST)/pytest -q -n logical --maxprocesses 8 --dist loadfile

# Damaged and hostile files for all readers: an hour or two; goes on where it was stopped. FUZZ_INPUTS: how many in all.
FUZZ_INPUTS ?= 100000
fuzz: $(INSTALLED)
	OMP_NUM_THREADS=1 PYTHONPATH=tests:. $(BIN)/python -m fuzzing --inputs $(FUZZ_INPUTS) --out docs/results/fuzz.json

# Kills, long runs, full and read-only disks: hours. `disks` is the last one, as it needs the right to mount.
reliability: $(INSTALLED)
	for part in kills generate distill together disks; do \
	  $(BIN)/python benchmarks/reliability.py $$part || exit; \
	done

# Builds the embedded pipeline by its recipe (hours). STEP: images, tokenizer, clip, vae, unet, assemble, decoder, check or all.
STEP ?= all
demo-build: $(INSTALLED)
	$(BIN)/python -m tools.demo $(STEP)

# STUDENTS: folders of distilled students of the embedded pipeline; they take part under their folders' names.
STUDENTS ?= $(wildcard runs/students/*)
ROUNDS ?= 3
benchmark: $(INSTALLED)
	$(BIN)/pip install --quiet -c constraints.txt -e ".[benchmark]"
	$(BIN)/asdm benchmark demo random:sd15 $(addprefix --student ,$(STUDENTS)) --rounds $(ROUNDS) --out docs/results

# Goes on where it was: a finished run is not run again.
ablation: $(INSTALLED)
	$(BIN)/python benchmarks/ablation.py run
	$(BIN)/python benchmarks/ablation.py time
	$(BIN)/python benchmarks/ablation.py show

slow: $(INSTALLED)
	$(BIN)/pip install --quiet -c constraints.txt -e ".[docs,examples]"
	$(BIN)/pytest -q -m slow

# The site, in site/; a warning is an error.
docs: $(INSTALLED)
	$(BIN)/pip install --quiet -c constraints.txt -e ".[docs]"
	$(BIN)/zensical build --strict --clean

lint: $(INSTALLED)
	$(BIN)/ruff check src tests tools benchmarks packages
	$(BIN)/ruff format --check src tests tools benchmarks packages
	$(BIN)/mypy

licenses: $(INSTALLED)
	$(BIN)/python -m tools.licenses

audit: $(INSTALLED)
	$(BIN)/pip install --quiet -c constraints.txt -e ".[audit]"
	$(BIN)/python -m tools.audit

$(INSTALLED): pyproject.toml constraints.txt packages/demo/pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet -c constraints.txt -e ".[$(EXTRAS)]" -e packages/demo
	touch $@

clean:
	rm -rf .venv .venv-lowest asdm-demo site
