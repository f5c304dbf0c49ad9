# make        lint, types, tests
# make fast   the inner loop: seconds
.PHONY: all lint types test fast golden demo bench

all: lint types test

lint:
	ruff check .

types:
	mypy

test:
	pytest

fast:
	pytest -m fast

golden:
	python -m adapterpack.testing > tests/golden/matrix.md
	python -m adapterpack.testing.catalogue > docs/methods.md
	python -m adapterpack.train.schema > train.v1.json.new && mv train.v1.json.new schemas/train.v1.json

demo:
	adapterpack demo
	adapterpack demo --causal-lm

bench:
	python benchmarks/merge.py
	python benchmarks/compose.py
