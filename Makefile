# make        lint, types, tests
# make fast   the inner loop: seconds
# make measure  which tests are too slow for it: those of the whole run that take longer than tests/inner_loop.py says
# make long   the demos, large models and further architectures: minutes
# make fuzz   ten minutes of mutated inputs
# make guided a minute of inputs guided by coverage for each reader, and more to its corpus (needs atheris); then how much of each module it reaches
# make night  an hour of random trials: kills, changed files, graphs; what fails is printed with its seed
# make guide  the generated pages of the guide, and the site
# make soak   half an hour of everything at once on a server
.PHONY: all lint types test fast measure long fuzz guided failing night soak golden guide demo bench

all: lint types test

lint:
	ruff check .
	ruff format --check .

types:
	mypy

test:
	pytest -n 2 --dist loadfile

fast:
	pytest -n 2 --dist loadfile -m fast

measure:
	pytest -n 2 --dist loadfile --measure

long:
	.ci/long

fuzz:
	python tests/fuzz/fuzz.py --seconds 600 --findings fuzz-findings

guided:
	python tests/fuzz/guided.py --seconds $(or $(SECONDS),60) --corpus tests/fuzz/corpus --findings fuzz-findings
	python tests/fuzz/reached.py

failing:
	python tests/failing/failing_writes.py
	python tests/failing/failing_writes.py --memory

night:
	python tests/night/night.py --seconds $(or $(SECONDS),3600) --findings night-findings

soak:
	python tests/serving/soak.py --minutes 30

golden:
	python tests/matrix_page.py > tests/golden/matrix.md
	python tests/architectures.py > tests/golden/architectures.md
	python tests/method_catalogue.py > docs/methods.md
	python tests/test_catalogue.py > docs/methods-proofs.md
	python tests/rule_catalogue.py > docs/rules.md
	python tests/training_families.py > train-families.new && mv train-families.new docs/train-families.md
	python tests/renamings.py > renamings.new && mv renamings.new adapterpack/base/renamings.json
	for name in manifest bundle fleet canary revoked; do python tests/format_schemas.py $$name > schemas/$$name.v1.json || exit 1; done
	python tests/own_bill.py > bill.new && mv bill.new adapterpack.cdx.json
	python tests/train_schema.py > train.v1.json.new && mv train.v1.json.new schemas/train.v1.json

guide:
	for page in commands catalogue pack_format errors; do python tests/guide/$${page}_page.py > page.new && mv page.new docs/$$(echo $$page | tr _ -).md || exit 1; done
	python tests/guide/training_files_page.py > page.new && mv page.new docs/migrating/training-files.md
	python tests/guide/mergekit_files_page.py > page.new && mv page.new docs/migrating/mergekit-files.md
	python tests/guide/other_servers_page.py > page.new && mv page.new docs/other-servers.md
	python tests/guide/api_page.py docs/api.md docs/api-methods.md
	mkdocs build --strict

demo:
	adapterpack demo
	adapterpack demo --causal-lm

bench:
	python benchmarks/merge.py
	python benchmarks/compose.py
	python benchmarks/extract.py
