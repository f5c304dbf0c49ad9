"""The examples for Ray, on one machine: replicas that keep their adapters, and files of rows by a pool of
processes.

They run where Ray is installed: in this environment, or in the one whose interpreter
``ADAPTERPACK_RAY_PYTHON`` names.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from processes import child, reserved_port

from adapterpack import Session, load, train

pytestmark = pytest.mark.long
ROOT = Path(__file__).parents[2]
PYTHON = os.environ.get("ADAPTERPACK_RAY_PYTHON", sys.executable)
NAMES = [None, "alpha", "beta", "gamma"]
WORDS = ["order", "mugs", "parcel", "Lisbon", "kettle"]
SERVE = """
import sys, ray
from ray import serve
from examples.serving.ray_serve import application
bundle, pack, port, folder = sys.argv[1:]
ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False, _temp_dir=folder)
serve.start(http_options={"host": "127.0.0.1", "port": int(port)})
serve.run(application(bundle, [pack], threads=1, replicas=2))
print("ready", flush=True)
sys.stdin.read()
serve.shutdown()
ray.shutdown()
"""
ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": str(ROOT),
    "OMP_NUM_THREADS": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
}


@pytest.fixture(scope="module", autouse=True)
def ray_is_there() -> None:
    imports = "import ray.serve, ray.data, ray.train.torch"
    tried = subprocess.run([PYTHON, "-c", imports], capture_output=True, text=True, check=False, timeout=120)
    if tried.returncode:
        assert "ADAPTERPACK_RAY_PYTHON" not in os.environ, (
            f"{PYTHON} cannot import Ray:\n{tried.stderr[-3000:]}"
        )
        pytest.skip(
            "RAY IS NOT INSTALLED: pip install 'adapterpack[ray]', or name an interpreter that has it "
            "in ADAPTERPACK_RAY_PYTHON"
        )


@pytest.fixture
def folder() -> Iterator[str]:
    """A folder for Ray's sockets, whose names must be short."""
    with tempfile.TemporaryDirectory(prefix="ray", ignore_cleanup_errors=True) as name:
        yield name


@pytest.fixture(scope="module")
def alone(bundle: Path, packs: Path) -> Callable[[str, str | None], str]:
    """What an adapter says to a prompt alone."""
    session = Session(bundle, "cpu")
    session.load(packs / "gamma")
    return lambda prompt, name: (
        session.generate([session.tokenizer.encode(prompt)], name, max_new_tokens=12)[0].text
    )


def test_replicas_keep_their_adapters(
    bundle: Path, packs: Path, folder: str, tmp_path: Path, alone: Callable[[str, str | None], str]
) -> None:
    """60 requests at a time, whole and streamed, on two replicas: each says what its adapter says alone, and
    an adapter is with one replica, but for a few requests; a refusal has its status.
    """
    command, errors = [PYTHON, "-c", SERVE, str(bundle), str(packs / "gamma")], tmp_path / "errors"
    with (
        reserved_port() as port,
        errors.open("w") as stderr,
        child(
            [*command, str(port), folder],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
            env=ENVIRONMENT,
        ) as process,
    ):
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n", errors.read_text()[-3000:]
        dice, address = random.Random(2), f"http://127.0.0.1:{port}"
        asked = [
            (" ".join(dice.choices(WORDS, k=dice.randint(1, 9))), dice.choice(NAMES), dice.random() < 0.5)
            for _ in range(60)
        ]

        def ask(prompt: str, name: str | None, streamed: bool) -> tuple[str, str]:
            body = {
                "model": name or "served",
                "prompt": prompt,
                "max_tokens": 12,
                "temperature": 0,
                "stream": streamed,
            }
            answer = httpx.post(f"{address}/v1/completions", json=body, timeout=120)
            assert answer.status_code == 200, answer.text
            lines = (
                [line[6:] for line in answer.text.splitlines() if line.startswith("data: {")]
                if streamed
                else [answer.text]
            )
            events = map(json.loads, lines)
            return "".join(event["choices"][0]["text"] for event in events), answer.headers["X-Ray-Replica"]

        with ThreadPoolExecutor(16) as pool:
            answers = list(pool.map(lambda one: ask(*one), asked))
        places: dict[str | None, Counter[str]] = {}
        for (prompt, name, _), (said, replica) in zip(asked, answers, strict=True):
            assert said == alone(prompt, name)
            places.setdefault(name, Counter())[replica] += 1
        # the next one is asked where the first is slow to say whether it has room
        for replicas in places.values():
            assert max(replicas.values()) >= 0.8 * replicas.total(), places
        assert (
            httpx.post(
                f"{address}/v1/completions", json={"model": "nobody", "prompt": "x"}, timeout=120
            ).status_code
            == 404
        )
        process.communicate(timeout=120)
        assert process.returncode == 0


@pytest.mark.parametrize("form", ["jsonl", "parquet"])
def test_files_of_rows(form: str, bundle: Path, tmp_path: Path, folder: str) -> None:
    """120 rows, two processes: in the order of the rows, each as it is alone, and an error in the place of
    what cannot be run; a folder of answers may be the next input.
    """
    dice = random.Random(3)
    rows: list[dict[str, Any]] = [
        {
            "prompt": " ".join(dice.choices(WORDS, k=dice.randint(1, 9))),
            "adapter": dice.choice(NAMES[:3]),
            "id": number,
        }
        for number in range(120)
    ]
    rows[50]["adapter"] = "nobody"
    source = tmp_path / f"rows.{form}"
    if form == "jsonl":
        source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), source)
    out = tmp_path / "answers"
    command = [
        PYTHON,
        str(ROOT / "examples" / "serving" / "ray_batch.py"),
        str(bundle),
        str(source),
        str(out),
        "--as",
        form,
        "--processes",
        "2",
        "--cores",
        "0.5",
        "--batch",
        "40",
        "--max-new-tokens",
        "12",
        "--provider",
        "cpu",
    ]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        env={**ENVIRONMENT, "RAY_TMPDIR": folder},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    answers = read(out, form)
    assert [answer["id"] for answer in answers] == list(range(120))
    session = Session(bundle, "cpu")
    for answer in answers[::11]:
        [said] = session.generate([answer["prompt"]], [answer["adapter"]], max_new_tokens=12)
        assert answer["completion"] == said.text
    assert [answer["id"] for answer in answers if answer["error"]] == [50]


def read(folder: Path, form: str) -> list[dict[str, Any]]:
    files = sorted(folder.glob("*"))
    if form == "jsonl":
        return [json.loads(line) for file in files for line in file.read_text().splitlines()]
    import pyarrow.parquet

    return [row for file in files for row in pyarrow.parquet.read_table(file).to_pylist()]


def test_workers_train_the_pack_of_one(folder: str, tiny_llama: Path, tmp_path: Path) -> None:
    """Two workers of Ray Train with a batch of two rows each, and one process with four."""
    rows = [{"prompt": f"w{row}", "completion": f"w{row + 9} w3"} for row in range(16)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = {
        "model_name_or_path": str(tiny_llama),
        "train_file": "rows.jsonl",
        "max_steps": 3,
        "learning_rate": 1e-2,
        "r": 2,
    }
    (tmp_path / "train.yaml").write_text(json.dumps(config))
    script = [
        PYTHON,
        str(ROOT / "examples" / "training" / "ray_train.py"),
        "train.yaml",
        "--workers",
        "2",
        "--results",
        folder,
    ]
    done = subprocess.run(
        [*script, "output_dir=two", "per_device_train_batch_size=2"],
        cwd=tmp_path,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (alone,) = train(
        {
            **config,
            "train_file": str(tmp_path / "rows.jsonl"),
            "output_dir": str(tmp_path / "one"),
            "per_device_train_batch_size": 4,
        }
    )
    together = load(tmp_path / "two")
    for name, value in alone.tensors.items():
        np.testing.assert_allclose(together.tensors[name], value, atol=1e-5)
