"""Runs inside a virtual environment with ``onnxruntime`` 1.32 and ``onnxruntime-genai``, and nothing of ours,
in the folder where ``model_package.py`` made its packages: a task in JSON comes by standard input, answers in
JSON go to standard output.
"""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import onnxruntime_genai as og


def main(prompt: list[int], tokens: int, names: list[str], shown: list[str]) -> dict[str, Any]:
    """Runs what the page shows, then every adapter by both ways; digests, a copy, and an altered bundle."""
    ort.set_default_logger_severity(3)
    opening, joining = shown
    bundle, gpu = (next(Path(name, "shared_assets").iterdir()) for name in ("package", "package-gpu"))
    for one in (bundle, gpu):
        assert ort.ModelPackage.compute_directory_hash(str(one)).replace(":", "-") == one.name
    page: dict[str, Any] = {"feeds": feeds_of(open_model("package").create_session(), [prompt])}
    exec(opening, page)
    session, model = page["session"], page["model"]
    assert (model.get_selected_variant_name(), session.get_providers()) == ("cpu", ["CPUExecutionProvider"])
    by_inputs = [
        greedy(lambda ids, name=name: by_name(session, bundle, ids, name), prompt, tokens)
        for name in [None, *names]
    ]
    assert int(page["logits"][0, -1].argmax()) == by_inputs[1][0]

    bank = open_model("bank").create_session()
    rows = range(len(names) + 1)
    by_bank = [greedy(lambda ids, row=row: in_bank(bank, ids, rows)[row], prompt, tokens) for row in rows]

    exec(joining, {})
    package = ort.ModelPackageContext("package")
    kept = open_model("package")
    assert Path(kept.get_selected_variant_folder_path()).name == bundle.name
    with ort.ModelPackage.open("package") as opened:
        (component,) = opened.get_info()["components"]
        found = {one["ep"]: Path(one["variant_directory"]).name for one in component["variants"]}
        assert found == {"CPUExecutionProvider": bundle.name, "CUDAExecutionProvider": gpu.name}
        opened.commit("copy")
    again = open_model("copy").create_session()
    assert greedy(lambda ids: by_name(again, bundle, ids, names[0]), prompt, tokens) == by_inputs[1]

    shutil.copytree("package", "altered")
    (Path("altered") / "shared_assets" / bundle.name / "config.json").write_text("{}")
    try:
        with ort.ModelPackage.open("altered") as opened:
            opened.commit("copy of altered")
    except RuntimeError as error:
        altered = str(error)
    else:
        raise SystemExit("an altered bundle was copied")
    return {
        "version": ort.__version__,
        "inputs": by_inputs,
        "bank": by_bank,
        "variants": {
            name: package.get_variant_ep_name("model", name) for name in package.get_variant_names("model")
        },
        "altered": altered,
        "genai_version": og.__version__,
        "genai": {
            "bundle": by_genai(lambda: og.Model(str(bundle)), bundle, names, prompt, tokens),
            "package": by_genai(
                lambda: og.Model(og.Config.from_package_ep("package", "cpu")), bundle, names, prompt, tokens
            ),
        },
    }


def open_model(package: str) -> Any:
    """The component of a package, of the variant for the CPU."""
    options = ort.ModelPackageOptions(ort.SessionOptions())
    return ort.ModelPackageContext(package).select_component("model", options)


def feeds_of(session: Any, rows: list[list[int]]) -> dict[str, np.ndarray]:
    """Rows of one length, with an empty cache."""
    ids = np.array(rows, np.int64)
    feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    for value in session.get_inputs():
        if value.name == "position_ids":
            feeds[value.name] = np.arange(ids.shape[1])[None].repeat(len(ids), 0)
        elif value.name.startswith("past_key_values."):
            feeds[value.name] = np.zeros((len(ids), value.shape[1], 0, value.shape[3]), np.float32)
    return feeds


def by_name(session: Any, bundle: Path, ids: list[int], name: str | None) -> np.ndarray:
    """The last logits with ONNX Runtime's own adapter."""
    options = ort.RunOptions()
    if name is not None:
        adapter = ort.LoraAdapter()
        adapter.Load(str(bundle / "adapters" / f"{name}.onnx_adapter"))
        options.add_active_adapter(adapter)
    return np.asarray(session.run(["logits"], feeds_of(session, [ids]), options)[0][0, -1])


def in_bank(session: Any, ids: list[int], rows: range) -> np.ndarray:
    """The last logits of rows with all adapters in one run."""
    feeds = {**feeds_of(session, [ids] * len(rows)), "adapter_ids": np.array(rows, np.int64)}
    return np.asarray(session.run(["logits"], feeds)[0][:, -1])


def greedy(logits: Callable[[list[int]], np.ndarray], prompt: list[int], tokens: int) -> list[int]:
    """The likeliest tokens after the prompt, one after the other."""
    ids = list(prompt)
    for _ in range(tokens):
        ids.append(int(logits(ids).argmax()))
    return ids[len(prompt) :]


def by_genai(
    load: Callable[[], Any], bundle: Path, names: list[str], prompt: list[int], tokens: int
) -> list[list[int]] | str:
    """The tokens of onnxruntime-genai, or why it refuses the folder."""
    try:
        model = load()
    except RuntimeError as error:
        return str(error)
    adapters, answers = og.Adapters(model), []
    for name in names:
        adapters.load(str(bundle / "adapters" / f"{name}.onnx_adapter"), name)
    for name in [None, *names]:
        params = og.GeneratorParams(model)
        params.set_search_options(do_sample=False, max_length=len(prompt) + tokens)
        generator = og.Generator(model, params)
        if name is not None:
            generator.set_active_adapter(adapters, name)
        generator.append_tokens(prompt)
        while not generator.is_done():
            generator.generate_next_token()
        answers.append([int(each) for each in generator.get_sequence(0)][len(prompt) :])
    return answers


if __name__ == "__main__":
    print(json.dumps(main(**json.load(sys.stdin))))
