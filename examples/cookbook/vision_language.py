"""A model that sees: trained on pictures with questions, exported, and asked about a picture under ONNX
Runtime.

    pip install 'adapterpack[all]'
    python examples/cookbook/vision_language.py llava-hf/llava-1.5-7b-hf pictures.jsonl packs/charts bundle

Each row of the file has an image (PNG, JPEG, or the processor's numbers as .npy) and a text:

    {"image": "pictures/1.png", "prompt": "What colour is the lamp?", "completion": "Red."}
"""

import json
import sys
from pathlib import Path

import adapterpack


def main(base: str, rows: str, out: str, bundle: str, steps: int = 200) -> str:
    """Trains, exports and returns what the adapter says of the first picture."""
    (pack,) = adapterpack.train(
        {
            "model_name_or_path": base,
            "task": "image-text-to-text",
            "train_file": rows,
            "output_dir": out,
            "r": 16,
            "target_modules": ["q_proj", "v_proj"],  # of both towers
            "learning_rate": 2e-4,
            "max_steps": steps,
            "max_length": 48,  # of the text; the image takes its own positions
            "per_device_train_batch_size": 2,
        }
    )
    adapterpack.export(base, [pack], bundle)  # a graph for the eye, and one for the language model
    first = json.loads(Path(rows).read_text("utf-8").splitlines()[0])
    question = {"image": first["image"], "prompt": first["prompt"], "adapter": pack.name}
    (answer,) = adapterpack.run(bundle, [question], max_new_tokens=16)
    return answer["completion"]


if __name__ == "__main__":
    if len(sys.argv) == 1:
        sys.exit(__doc__)
    print(main(*sys.argv[1:5], *map(int, sys.argv[5:])))
