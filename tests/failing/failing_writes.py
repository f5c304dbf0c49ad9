"""Commands on a disk that fails: the n-th write, fsync, rename and so on fails, for every n in turn, up to the last;
and commands on a machine without memory: the n-th large allocation fails.

    python tests/failing/failing_writes.py [COMMAND ...] [--most N] [--first N] [--jobs 2]
    python tests/failing/failing_writes.py --memory [COMMAND ...] [--most N] [--jobs 2]

Each run is a process of its own below nth_write.c or nth_allocation.c, which a C compiler makes. After a failure the output must not
be there, or be whole; what was there before must be as it was; nothing else may be left; and the last words must be
a sentence of this package's, no traceback. A training is continued afterwards and must end with the same pack.
``--most`` tries that many n, the first and the last among them. Without it every n is tried, which takes an hour; ``--first``
goes on where that was interrupted.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

TOKEN = "hf_writerwriterwriterwriter"
State = dict[str, str]
"""The digest of each file below a folder, by path."""


@dataclass(frozen=True)
class Trial:
    """A command: its arguments, in a folder with ``made``; its output; and how it goes on after a failure."""

    name: str
    arguments: Sequence[str]
    output: str
    again: Sequence[str] = ()
    prepare: Callable[[Path], None] = lambda folder: None
    kept: Sequence[str] = ()
    """What may be left beside the output: what the next run goes on from."""


def trials() -> Iterator[Trial]:
    """The commands that write what others trust."""
    yield Trial("pack", ("convert", "made/peft", "-o", "out", "--base", "made/base"), "out")
    yield Trial("merge", ("merge", "made/base", "made/packs/alpha", "-o", "out"), "out")
    yield Trial(
        "compose", ("compose", "made/packs/alpha", "made/packs/beta", "-o", "out", "--rule", "linear"), "out"
    )
    yield Trial("quantize", ("quantize", "made/packs/alpha", "-o", "out", "--scheme", "int8"), "out")
    yield Trial(
        "compress", ("compress", "made/packs/alpha", "made/packs/beta", "-o", "out", "--basis", "2"), "out"
    )
    export = ("export", "made/base", "made/packs/alpha", "-o", "out", "--mode", "bank")
    yield Trial("export", (*export, "--frontend", "mobius"), "out")  # without a name, another one helps out
    yield Trial("gguf", ("convert", "made/packs/alpha", "-o", "out.gguf", "--base", "made/base"), "out.gguf")
    yield Trial("sign", ("sign", "out", "--key", "made/key.pem"), "out", prepare=_copy_pack)
    yield Trial("inspect", ("inspect", "made/packs/alpha", "--html", "out.html"), "out.html")
    yield Trial("pull", ("pull", "hf://org/alpha", "-o", "out"), "out", kept=("adapterpack.lock",))
    train = ("train", "made/train.yaml")
    yield Trial("train", train, "out", again=train, kept=("out.checkpoints",))


def _copy_pack(folder: Path) -> None:
    shutil.copytree(folder / "made/packs/alpha", folder / "out")


LARGE = 100_000
"""Bytes of an allocation that fails: the models are tiny, and what Python takes for its objects is smaller."""


def library(folder: Path, name: str = "nth_write") -> Path:
    """Compiles what lets calls fail."""
    path = folder / f"{name}.so"
    command = ["cc", "-O1", "-shared", "-fPIC", "-o", str(path), str(HERE / f"{name}.c"), "-ldl"]
    subprocess.run(command, check=True)
    return path


def run(trial: Trial, made: Path, preload: Path, fail_at: int, scratch: Path) -> tuple[int, list[str]]:
    """Runs a command with its ``fail_at``-th call failing; returns how many calls there were, and what is wrong."""
    with tempfile.TemporaryDirectory(dir=scratch) as name:
        work = Path(os.path.realpath(name)) / "work"
        work.mkdir()
        (work / "made").symlink_to(made)
        trial.prepare(work)
        before = state_of(work)
        count = work.parent / "count"
        count.touch()
        failing = {
            "FAIL_BELOW": str(made if preload.stem == "nth_allocation" else work),
            "FAIL_LARGE": str(LARGE),
            "FAIL_AT": str(fail_at),
            "FAIL_COUNT": str(count),
            "LD_PRELOAD": str(preload),
        }
        ended = _command(trial.arguments, work, failing)
        calls, after = count.stat().st_size, state_of(work)
        whole = WHOLE.get(trial.name)
        if not fail_at:
            WHOLE[trial.name] = _output(after, trial)
            return calls, [] if ended.returncode == 0 else [f"it fails: {ended.stderr[-500:]}"]
        wrong = []
        said = ended.stderr.strip().splitlines()[-1:] or [""]
        if ended.returncode == 0 and _output(after, trial) != whole:
            wrong.append("it says nothing, and the output is another")
        # a library in Rust ends the process itself where it gets no memory
        if ended.returncode not in (0, -signal.SIGABRT) and (
            "Traceback" in ended.stderr
            or "this is a bug" in said[0]
            or not said[0].startswith(("Error: ", "error: "))
        ):
            wrong.append(f"its last words: {said[0][:200]}")
        if ended.returncode and _output(after, trial) not in ({}, _output(before, trial), whole):
            wrong.append("a part of the output is there")
        left = {
            path
            for path in after
            if path not in before and not _is_in(path, (trial.output, "cache", *trial.kept))
        }
        if left:
            wrong.append(f"left behind: {', '.join(sorted(left)[:3])}")
        if ended.returncode and trial.again and _output(after, trial) != whole:
            again = _command(trial.again, work, {})
            if again.returncode or _output(state_of(work), trial) != whole:
                wrong.append(f"it cannot be continued: {again.stderr.strip()[-200:]}")
        return calls, [f"{trial.name}, {fail_at} of its calls: {one}" for one in wrong]


WHOLE: dict[str, State] = {}
SECONDS = 600
"""The most that a command may take."""


def told(trial: Trial, made: Path, preload: Path, fail_at: int, scratch: Path) -> list[str]:
    """As ``run``, for what is wrong alone, which is printed at once; a command without an end is wrong, too."""
    try:
        _, wrong = run(trial, made, preload, fail_at, scratch)
    except subprocess.TimeoutExpired:
        wrong = [f"{trial.name}, {fail_at} of its calls: not at an end after {SECONDS} seconds"]
    for one in wrong:
        print(f"  {one}", flush=True)
    return wrong


def _command(
    arguments: Sequence[str], work: Path, failing: dict[str, str]
) -> subprocess.CompletedProcess[str]:
    environment = {
        **os.environ,
        **failing,
        "ADAPTERPACK_CACHE": str(work / "cache"),
        "HF_HOME": str(work.parent / "hf"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_TOKEN": TOKEN,
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "SOURCE_DATE_EPOCH": "1700000000",
    }
    return subprocess.run(
        [sys.executable, "-m", "adapterpack", *arguments],
        cwd=work,
        env=environment,
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )


def _output(state: State, trial: Trial) -> State:
    return {path: digest for path, digest in state.items() if _is_in(path, (trial.output,))}


def _is_in(path: str, places: Sequence[str]) -> bool:
    return any(path == place or path.startswith(f"{place}/") for place in places)


def state_of(folder: Path) -> State:
    """The digest of every file but signatures, which are drawn, and the folders; not what is linked."""
    return {
        str(path.relative_to(folder)): ""
        if path.is_dir() or path.name == "adapterpack.sig.json"
        else hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if not path.is_symlink()
    }


def chosen(calls: int, most: int | None) -> list[int]:
    """The numbers of the calls that fail, evenly spaced, the first and the last among them."""
    if most is None or calls <= most:
        return list(range(1, calls + 1))
    return sorted({1 + round(place * (calls - 1) / max(1, most - 1)) for place in range(most)})


def try_all(
    names: Sequence[str],
    made: Path,
    most: int | None,
    jobs: int,
    scratch: Path,
    what: str = "nth_write",
    first: int = 1,
) -> list[str]:
    """Tries the commands of these names, all if none is named; returns what is wrong."""
    preload, wrong = library(scratch, what), []
    for trial in trials():
        if names and trial.name not in names:
            continue
        calls, unfailed = run(trial, made, preload, 0, scratch)
        for one in unfailed:
            print(f"{trial.name}: {one}")
        wrong += unfailed
        places = [place for place in chosen(calls, most) if place >= first]
        with ThreadPoolExecutor(jobs) as pool:
            each = pool.map(partial(told, trial, made, preload, scratch=scratch), places)
            found = [one for some in each for one in some]
        print(
            f"{trial.name}: {calls} calls, {len(places)} of them failed, {len(found)} times wrong", flush=True
        )
        wrong += found
    return wrong


@contextmanager
def hub_with(pack: Path, folder: Path) -> Iterator[None]:
    """A hub that has a pack, while the block lasts; commands find it by the environment."""
    (folder / "tokens").write_text(f"writer write {TOKEN}\n")
    (folder / "tokens").chmod(0o600)
    command = [
        sys.executable,
        "-m",
        "adapterpack",
        "hub",
        "serve",
        "hub",
        "--port",
        "0",
        "--tokens",
        "tokens",
        "--json",
    ]
    with subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, text=True) as hub:
        try:
            assert hub.stdout is not None
            os.environ["HF_ENDPOINT"] = json.loads(hub.stdout.readline())["address"]
            os.environ["HF_HUB_OFFLINE"] = "0"
            pushed = _command(
                ("push", str(pack), "hf://org/alpha", "--base-model", "org/base", "--license", "mit"),
                folder / "work",
                {},
            )
            assert pushed.returncode == 0, pushed.stderr
            yield
        finally:
            hub.terminate()


def make(folder: Path) -> Path:
    """What the commands read: a tiny base, packs of it, the same as a folder of PEFT, rows, a key."""
    import torch
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from transformers import LlamaConfig, LlamaForCausalLM
    from word_tokenizer import VOCABULARY, write_tokenizer

    from adapterpack import LoRA, adapt, save

    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=64,
    )
    base = folder / "base"
    LlamaForCausalLM(config).save_pretrained(base)
    write_tokenizer(base)
    for name in ("alpha", "beta"):
        model = adapt(LlamaForCausalLM.from_pretrained(base), LoRA(r=2), name)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.normal_(0, 0.1)
        save(model, folder / "packs" / name, base=base)
    (folder / "peft").mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(folder / "packs/alpha" / name, folder / "peft")
    (folder / "rows.jsonl").write_text("".join(f'{{"text": "w{n} w{n + 1} w3"}}\n' for n in range(8)))
    key = ec.generate_private_key(ec.SECP256R1())
    (folder / "key.pem").write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
    )
    settings = {
        "model_name_or_path": "made/base",
        "task": "text-generation",
        "train_file": "made/rows.jsonl",
        "output_dir": "out",
        "method": "lora",
        "r": 2,
        "max_steps": 4,
        "save_steps": 2,
        "per_device_train_batch_size": 2,
        "seed": 0,
    }
    (folder / "train.yaml").write_text("".join(f"{key}: {value}\n" for key, value in settings.items()))
    return folder


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("commands", nargs="*")
    parser.add_argument("--most", type=int)
    parser.add_argument("--first", type=int, default=1, help="goes on at this call, after an interruption")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--memory", action="store_true", help="allocations fail in place of writes")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        made = make(scratch / "made")
        (scratch / "work").mkdir()
        with hub_with(made / "packs/alpha", scratch):
            what = "nth_allocation" if args.memory else "nth_write"
            return bool(try_all(args.commands, made, args.most, args.jobs, scratch, what, args.first))


if __name__ == "__main__":
    sys.exit(main())
