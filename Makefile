# `make demo` trains a small model by RL on this machine; `make test` runs every check. Both set up .venv first.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test lint types wheel docs bench bench-track slow matrix clean

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[rl,detect,trl,dev]'
	touch $@

demo: .venv/ready
	$(BIN)/prefixloss train --out runs/demo --overwrite

# a process a core, each with one thread; in random order, whose seed is printed: `pytest --randomly-seed=N` repeats it,
# `-p no:randomly` takes the files' own order
test: lint types wheel
	OMP_NUM_THREADS=1 $(BIN)/pytest -m "not slow" -n auto --dist loadfile

slow: .venv/ready
	$(BIN)/pytest -m slow

# other versions of trainers and transformers, each pair in an environment of its own: about half an hour, and the network;
# `python tests/integrations/matrix.py --only verl` renews the rows of verl
matrix: .venv/ready
	$(BIN)/python tests/integrations/matrix.py

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/ready
	$(BIN)/mypy

# the package as a user gets it: built, installed into an empty environment, imported from elsewhere
wheel: .venv/ready
	rm -rf build dist
	$(BIN)/python -m build --wheel --no-isolation --outdir dist . > /dev/null
	$(PYTHON) -m venv build/empty
	build/empty/bin/pip install --quiet --constraint constraints.txt dist/*.whl
	cd build && empty/bin/python -c "import prefixloss, prefixloss._kernels as k, prefixloss._bench as b; print('wheel:', prefixloss.__version__, k.__name__, b.__name__)"

.venv/docs: .venv/ready
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[docs]'
	touch $@

# the pages of docs/ as a site in build/docs; a broken link ends it
docs: .venv/docs
	$(BIN)/sphinx-build -W --keep-going -q docs build/docs

.venv/bench: .venv/ready
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[bench]'
	touch $@

# about half an hour on two cores: figures, tables, pictures, and three of the figures in the README
bench: .venv/bench
	$(BIN)/prefixloss bench --json bench/results/cpu.json
	$(BIN)/prefixloss bench plot bench/results/cpu.json --out bench/results
	$(BIN)/prefixloss bench table bench/results/cpu.json --into bench/results/README.md
	$(BIN)/prefixloss bench table bench/results/cpu.json --figures --into README.md

# saves this commit's times and compares them with those saved before; TRACK chooses cases, as pytest's -k does
TRACK ?= floor-narrow or floor-wide
bench-track: .venv/bench
	$(BIN)/pytest bench/speed/test_speed.py -k '$(TRACK)' --benchmark-autosave
	$(BIN)/pytest-benchmark compare --group-by fullname --columns median,iqr --sort fullname

clean:
	rm -rf .venv build dist runs
