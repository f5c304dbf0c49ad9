"""A method of another package along the whole line, through the processes that its user starts."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import adapterpack

EXAMPLE = Path(__file__).parent.parent / "examples" / "new_method.py"
FP32 = 2e-5
"""Absolute, on logits of about 1: float32 on both sides, sums in another order."""


@pytest.mark.long
def test_a_method_of_another_package_walks_the_line(tiny_llama: Path, tmp_path: Path) -> None:
    """One file beside adapterpack is listed, trains, validates, merges and is exported; the graph that runs
    is the merged checkpoint.
    """
    site = tmp_path / "site"
    (site / "a_plugin-1.0.dist-info").mkdir(parents=True)
    (site / "a_plugin-1.0.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: a-plugin\nVersion: 1.0\n"
    )
    (site / "a_plugin-1.0.dist-info" / "entry_points.txt").write_text(
        "[adapterpack.methods]\nscaling = new_method:scaling\n"
    )
    shutil.copy(EXAMPLE, site)
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_CACHE": str(tmp_path / "cache"),
        "PYTHONPATH": os.pathsep.join([str(site), str(Path(adapterpack.__file__).parents[1])]),
    }

    def said(*arguments: Any, code: int = 0) -> Any:
        done = subprocess.run(
            [sys.executable, "-m", "adapterpack", *map(str, arguments), "--json"],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=300,
        )
        assert done.returncode == code, done.stderr
        return json.loads(done.stdout)

    assert {method["name"] for method in said("methods")["methods"]} == {*adapterpack.methods(), "scaling"}

    rows, config, pack = tmp_path / "rows.jsonl", tmp_path / "train.yaml", tmp_path / "scaled"
    rows.write_text(
        "".join(
            json.dumps({"prompt": f"w{i % 6 + 40} w7", "completion": f" w{i % 3 + 60}"}) + "\n"
            for i in range(16)
        )
    )
    settings = {
        "task": "text-generation",
        "model_name_or_path": tiny_llama,
        "train_file": rows,
        "output_dir": pack,
        "method": "scaling",
        # the base has no biases
        "learning_rate": 0.05,
        "max_steps": 6,
        "max_length": 16,
        "shifted": "false",
    }
    config.write_text("".join(f"{key}: {value}\n" for key, value in settings.items()))
    [trained] = said("train", config)["packs"]
    assert (trained["method"], trained["training"]["steps"]) == ("scaling", 6)

    assert said("validate", pack, "--base", tiny_llama)["state"] == "valid"
    merged, bundle = tmp_path / "merged", tmp_path / "bundle"
    assert said("merge", tiny_llama, pack, "-o", merged)["tensors_changed"]
    assert [adapter["name"] for adapter in said("export", tiny_llama, pack, "-o", bundle)["adapters"]] == [
        "scaled"
    ]

    ids = np.array([[44, 7, 60, 46, 5]])

    def logits(folder: Path) -> np.ndarray:
        with torch.no_grad():
            return AutoModelForCausalLM.from_pretrained(folder).eval()(torch.tensor(ids)).logits.numpy()

    program = (
        "import sys, numpy, adapterpack\n"
        f"ids = numpy.array({ids.tolist()})\n"
        "inputs = {'input_ids': ids, 'attention_mask': numpy.ones_like(ids)}\n"
        "numpy.save(sys.argv[2], adapterpack.Session(sys.argv[1]).run(inputs, ['scaled'])['logits'])\n"
    )
    subprocess.run(
        [sys.executable, "-c", program, str(bundle), str(tmp_path / "served.npy")],
        env=environment,
        check=True,
        timeout=300,
    )
    served = np.load(tmp_path / "served.npy")
    np.testing.assert_allclose(served, logits(merged), rtol=0, atol=FP32)
    assert np.abs(served - logits(tiny_llama)).max() > 100 * FP32, "six steps changed something"
