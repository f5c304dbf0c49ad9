# make        lint, types, tests
# make fast   the inner loop: seconds
# make fuzz   ten minutes of mutated inputs
.PHONY: all lint types test fast fuzz golden demo bench

all: lint types test

lint:
	ruff check .

types:
	mypy

test:
	pytest

fast:
	pytest -m fast

fuzz:
	python tests/fuzz/fuzz.py --seconds 600 --findings fuzz-findings

golden:
	python -m adapterpack.testing > tests/golden/matrix.md

demo:
	adapterpack demo
	adapterpack demo --causal-lm

bench:
	python benchmarks/merge.py
	python benchmarks/compose.py
