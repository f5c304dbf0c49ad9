"""A model that sees and writes, trained on pictures with questions and answers: LLaVA and models of its kind.

    pip install 'adapterpack[vision]'
    python examples/training/vision_language.py llava-hf/llava-1.5-7b-hf packs/charts pictures.jsonl

Each row has an image and a text in any form of language models' data:

    {"image": "pictures/1.png", "prompt": "What colour is the lamp?", "completion": "Red."}
    {"image": "pictures/1.png", "messages": [{"role": "user", "content": "Describe it."}, {"role":
    "assistant", "content": "A lamp."}]}
"""

import sys

import adapterpack


def main(base: str, out: str, rows: str, steps: int = 200) -> adapterpack.Pack:
    """Trains on images with texts, and packs."""
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
    return pack


if __name__ == "__main__":
    if len(sys.argv) == 1:
        sys.exit(__doc__)
    print(main(*sys.argv[1:4], *map(int, sys.argv[4:])))
