#!/bin/bash -eu
# One fuzzer for each reader of tests/fuzz/targets.py, with the inputs that were kept as its seeds.
pip3 install '.[test]' atheris
export PYTHONPATH=$PWD/tests/fuzz:$PWD/tests:$PWD/tests/packs
for target in $(python3 tests/fuzz/fuzz.py --names); do
    fuzzer=$SRC/fuzz_$target.py
    cat > "$fuzzer" <<PYTHON
import sys
sys.argv[1:1] = ["--inside", "$target"]
import guided
guided.main()
PYTHON
    compile_python_fuzzer "$fuzzer" --paths tests/fuzz --paths tests --paths tests/packs --add-data tests/golden:golden
    if [ -f "tests/fuzz/corpus/$target.tar.xz" ]; then
        mkdir -p "corpus/$target"
        tar xJf "tests/fuzz/corpus/$target.tar.xz" -C "corpus/$target"
        zip -jqr "$OUT/fuzz_${target}_seed_corpus.zip" "corpus/$target"
    fi
done
