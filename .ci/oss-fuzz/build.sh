#!/bin/bash -eu
# One fuzzer for each reader of tests/fuzz/targets.py, which begins with the good inputs and with those that were kept.
# The readers need neither torch nor a GPU nor our kernels: of ONNX Runtime's builds the small one.
ADAPTERPACK_PURE=1 pip3 install '.[gguf]' atheris pyarrow pytest
pip3 uninstall -y onnxruntime-gpu
pip3 install onnxruntime
export PYTHONPATH=$PWD/tests/fuzz:$PWD/tests:$PWD/tests/packs
# The modules of tests/ lie beside their data as they do here, and are read from there.
data=(--add-data "$PWD/examples:examples" --add-data "$PWD/tests/test_templates.py:tests")
for folder in fuzz golden packs; do
    data+=(--add-data "$PWD/tests/$folder:tests/$folder")
done
python3 tests/fuzz/fuzz.py --write "$SRC/inputs"
for target in ${TARGETS:-$(python3 tests/fuzz/fuzz.py --names)}; do
    fuzzer=$SRC/fuzz_$target.py
    cat > "$fuzzer" <<PYTHON
import os, sys
if sys.argv[1:4] == ["-I", "-S", "-c"]:  # a sandbox wants Python, by the name below
    statements, sys.argv[:] = sys.argv[4], ["-c", *sys.argv[5:]]
    exec(statements)
    sys.exit()
# what starts this program again without unpacking it again, though a sandbox keeps no variables
again = sys._MEIPASS + "/python"
with open(again, "w") as file:
    file.write("#!/bin/sh\n")
    file.writelines(f"export {name}='{value}'\n" for name, value in os.environ.items() if name.startswith("_PYI_"))
    file.write(f'exec {sys.executable} "\$@"\n')
os.chmod(again, 0o700)
sys.executable = again
sys.argv[1:1] = ["--inside", "$target"]
sys.path.insert(0, sys._MEIPASS + "/tests/fuzz")
import guided
guided.main()
PYTHON
    compile_python_fuzzer "$fuzzer" --paths tests/fuzz --paths tests --paths tests/packs --collect-all adapterpack "${data[@]}"
    zip -jqr "$OUT/fuzz_${target}_seed_corpus.zip" "$SRC/inputs/$target"
done
