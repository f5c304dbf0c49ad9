"""A bundle of mode ``inputs`` under ONNX Runtime alone: its own ``LoraAdapter`` and
``RunOptions.add_active_adapter``, nothing of ours.

    python tests/interop/plain_onnxruntime.py BUNDLE FEEDS.npz OUT.npz [ADAPTER ...]

Runs the feeds once without an adapter, once with each of the named ones, and once more without; writes
``logits`` of each as ``run_N``.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import onnxruntime as ort

# whoever asks for it from here on gets an ImportError
sys.modules["adapterpack"] = None  # type: ignore[assignment]


def main(bundle: Path, feeds: Path, out: Path, names: list[str]) -> None:
    """Runs and writes."""
    session = ort.InferenceSession(bundle / "model.onnx", providers=["CPUExecutionProvider"])
    batch = dict(np.load(feeds))
    answers = {}
    for number, name in enumerate([None, *names, None]):
        options = ort.RunOptions()
        if name is not None:
            adapter = ort.LoraAdapter()
            adapter.Load(str(bundle / "adapters" / f"{name}.onnx_adapter"))
            options.add_active_adapter(adapter)
        answers[f"run_{number}"] = session.run(["logits"], batch, options)[0]
    assert {value.name for value in session.get_inputs()} == set(batch), (
        "slots are optional, and nothing else is"
    )
    assert not any(name.partition(".")[0] in {"torch", "transformers"} for name in sys.modules)
    np.savez(out, **answers)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4:])
