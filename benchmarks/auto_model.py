"""The model ``auto``: how often a server chooses the right one of twenty adapters by the text, what it does
with texts of none of them, and what that takes; and how long the first token of an adapter takes that nobody
had loaded.

The twenty sets are texts that are at hand: the shop's tickets, reviews and orders of the examples; the
documentation of nine Python libraries, which lie near one another; of another three kinds of prose, code in
three languages, and the names of countries and languages in German and French. A text has 8 to 80 words. An
adapter of SmolLM2 is trained on 125 texts of each, for a few steps, and measured; 25 other texts are asked
for. The texts of none of them are of other libraries' documentation, for the most part: as near as the nine.

    python benchmarks/auto_model.py --keep build/auto
    python benchmarks/auto_model.py --keep build/auto --json
"""

from __future__ import annotations

import argparse
import ast
import json
import random
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import metadata, util
from pathlib import Path
from typing import Any

import babel
import httpx
import numpy as np
import psutil

import adapterpack
from adapterpack.demos import SMOLLM2, fetch
from adapterpack.pack.text_profile import TextIndex, TextProfile

ROOT = Path(__file__).parents[1]
LEARNT, HELD_OUT, FOREIGN = 125, 25, 500
MANY = 10_000
FILES = 150
"""Of a library, drawn at random."""
Texts = Callable[[], Iterator[str]]


def cut(text: str) -> Iterator[str]:
    """The beginning of a text, if it is long enough, and words."""
    words = text.split()
    if len(words) >= 8:
        yield " ".join(words[:80])


def folder_of(package: str) -> Path:
    spec = util.find_spec(package)
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parent if spec.submodule_search_locations else Path(spec.origin)


def documentation(package: str, part: str = "") -> Texts:
    """What the docstrings of a package say, without examples."""

    def texts() -> Iterator[str]:
        place = folder_of(package)
        files = sorted((place / part).rglob("*.py")) if place.is_dir() else [place]
        random.Random(0).shuffle(files)
        for file in files[:FILES]:
            if "test" in file.name or "/tests/" in file.as_posix():
                continue
            try:
                tree = ast.parse(file.read_text("utf-8"))
            except (SyntaxError, ValueError):
                continue
            for node in ast.walk(tree):
                if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                    yield from cut((ast.get_docstring(node) or "").partition(">>>")[0])

    return texts


def pieces(*files: Path) -> Iterator[str]:
    """The paragraphs of files."""
    for file in files:
        for piece in re.split(r"\n\s*\n", file.read_text("utf-8", "replace")):
            yield from cut(piece)


def code(folder: Path, ending: str) -> Texts:
    """The paragraphs of a language's files that do not begin as comments."""
    return lambda: (text for text in pieces(*sorted(folder.rglob(f"*.{ending}"))) if text[0] not in "/#*\"'")


def example(name: str) -> Texts:
    def texts() -> Iterator[str]:
        for part in ("train", "test"):
            for line in (ROOT / "examples" / "data" / f"{name}.{part}.jsonl").read_text("utf-8").splitlines():
                row = json.loads(line)
                yield row["text"] if "text" in row else row["prompt"].partition("\n\n")[2]

    return texts


def licences() -> Iterator[str]:
    for package in metadata.distributions():
        for file in package.files or ():
            if "licen" in file.name.lower() and Path(file.locate()).is_file():
                yield from pieces(Path(file.locate()))


def names(language: str) -> Texts:
    """Ten names of countries and languages at a time."""

    def texts() -> Iterator[str]:
        locale, dice = babel.Locale(language), random.Random(language)
        words = [str(word) for table in (locale.territories, locale.languages) for word in table.values()]
        for _ in range(400):
            yield ", ".join(dice.sample(words, 10))

    return texts


KNOWN: Mapping[str, Texts] = {
    **{name: example(name) for name in ("tickets", "reviews", "orders")},
    **{
        name: documentation(name)
        for name in ("numpy", "sklearn", "pandas", "transformers", "peft", "networkx", "sympy", "kubernetes")
    },
    "statistics": documentation("scipy", "stats"),
    "layers": documentation("torch", "nn"),
    "licences": licences,
    "guide": lambda: pieces(*sorted((ROOT / "docs" / "stages").glob("*.md")), ROOT / "docs" / "serve.md"),
    "python": code(folder_of("uvicorn"), "py"),
    "c": code(folder_of("numpy") / "_core" / "include", "h"),
    "javascript": code(ROOT / "web", "[jt]s"),
    "german": names("de"),
    "french": names("fr"),
}
OTHERS: Mapping[str, Texts] = {
    **{
        name: documentation(name)
        for name in (
            *("PIL", "requests", "nltk", "asyncio", "email", "pygments", "tkinter", "jinja2", "unittest"),
            *("openai", "torchmetrics", "cryptography", "logging", "rich", "onnx", "click", "httpx"),
        )
    },
    "c++": code(folder_of("torch") / "include" / "c10", "h"),
    "spanish": names("es"),
    "italian": names("it"),
}


def drawn(sets: Mapping[str, Texts], count: int) -> dict[str, list[str]]:
    """So many different texts of each."""
    found = {}
    for name, texts in sets.items():
        every = sorted(set(texts()))
        random.Random(0).shuffle(every)
        found[name] = every[:count]
    return found


def prepared(keep: Path) -> tuple[Path, dict[str, list[str]], list[str]]:
    """The bundle, beside which lie the adapters; the texts that each is asked for, and those of none."""
    keep.mkdir(parents=True, exist_ok=True)
    base, file = fetch(SMOLLM2), keep / "texts.json"
    if not file.exists():
        texts = {"known": drawn(KNOWN, LEARNT + HELD_OUT), "others": drawn(OTHERS, 40)}
        file.write_text(json.dumps(texts))
    texts = json.loads(file.read_text())
    for name, rows in texts["known"].items():
        assert len(rows) == LEARNT + HELD_OUT, (name, len(rows))
        pack = keep / "packs" / name
        if pack.exists():
            continue
        learnt = [
            {"messages": [{"role": "user", "content": row}, {"role": "assistant", "content": name}]}
            for row in rows[:LEARNT]
        ]
        data = keep / f"{name}.jsonl"
        data.write_text("\n".join(map(json.dumps, learnt)))
        adapterpack.train(
            {
                "model_name_or_path": str(base),
                "task": "text-generation",
                "train_file": str(data),
                "output_dir": str(keep / "trained" / name),
                "max_steps": 2,
                "per_device_train_batch_size": 2,
                "max_length": 128,
                "targets": ["q_proj", "v_proj"],
                "learning_rate": 1e-3,
                "r": 4,
            },
            overwrite=True,
        )
        adapterpack.measure(base, keep / "trained" / name, str(data), kind="texts", out=pack)
    bundle = keep / "bundle"
    if not bundle.exists():
        packs = [keep / "packs" / name for name in texts["known"]]
        adapterpack.export(base, packs[:1], bundle, mode="bank", in_place=True, slots=4, max_rank=4)
    others = [text for rows in texts["others"].values() for text in rows][:FOREIGN]
    return bundle, {name: rows[LEARNT:] for name, rows in texts["known"].items()}, others


class Server:
    """A server of the bundle, with these options."""

    def __init__(self, bundle: Path, *options: str) -> None:
        command = [sys.executable, "-m", "adapterpack", "serve", str(bundle), "--port", "0", "--json"]
        self.process = subprocess.Popen(
            [*command, "--audit", "", "--threads", "1", *options], stdout=subprocess.PIPE, text=True
        )
        assert self.process.stdout is not None
        self.address = json.loads(self.process.stdout.readline())["address"]
        self.count = 0
        self.client = httpx.Client(base_url=self.address, timeout=300)

    def ask(self, model: str, text: str) -> tuple[dict[str, Any], float]:
        """The answer of one token, and the seconds that it took."""
        begun = time.perf_counter()
        self.count += 1
        salt = str(self.count)  # what was read of a prompt before would make the second answer faster
        body = {"model": model, "prompt": text, "max_tokens": 1, "temperature": 0, "cache_salt": salt}
        answer = self.client.post("/v1/completions", json=body)
        answer.raise_for_status()
        return answer.json(), time.perf_counter() - begun

    def close(self) -> None:
        self.client.close()
        self.process.terminate()
        self.process.wait()


def choices(bundle: Path, asked: Mapping[str, Sequence[str]], others: Sequence[str]) -> dict[str, Any]:
    """What the server chooses for each text."""
    server = Server(bundle, "--adapters", str(bundle.parent / "packs"))
    every = [(name, text) for name, texts in asked.items() for text in texts]
    said = [server.ask("auto", text)[0]["adapterpack"] for _, text in every]
    foreign = [server.ask("auto", text)[0]["adapterpack"] for text in others]
    names, chosen = [name for name, _ in every], [one["adapter"] for one in said]
    right = np.array([one == name for one, name in zip(chosen, names, strict=True)])
    base = np.array([one is None for one in chosen])
    sure = np.array([one["sure"] for one in said])
    spent: dict[str, list[float]] = {"auto": [], "named": []}
    for name, text in every[::5]:
        for kind, model in (("auto", "auto"), ("named", name)):
            spent[kind].append(server.ask(model, text)[1])
    server.close()
    bins = [
        {"said": float(sure[some].mean()), "right": float(right[some].mean()), "texts": int(some.sum())}
        for low, high in ((0.5, 0.7), (0.7, 0.9), (0.9, 1.01))
        if (some := ~base & (sure >= low) & (sure < high)).any()
    ]
    return {
        "texts": len(every),
        "right": float(right.mean()),
        "base": float(base.mean()),
        "wrong": float((~right & ~base).mean()),
        "by_set": {
            name: float(np.mean([good for good, other in zip(right, names, strict=True) if other == name]))
            for name in asked
        },
        "sure": bins,
        "foreign_texts": len(foreign),
        "foreign_base": float(np.mean([one["adapter"] is None for one in foreign])),
        "request_ms": {kind: 1e3 * float(np.median(times)) for kind, times in spent.items()},
    }


def speed(bundle: Path, asked: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """Microseconds of a choice among many adapters, whose profiles are those of the twenty over and over: what
    they hold does not matter, only how much.
    """
    packs = [adapterpack.load(pack) for pack in sorted((bundle.parent / "packs").iterdir())]
    profiles = [TextProfile.of(pack) for pack in packs]
    tokenizer = adapterpack.Session(bundle).tokenizer
    texts = [tokenizer.encode(text, special=False) for texts in asked.values() for text in texts]
    result: dict[str, Any] = {"tokens": float(np.mean(list(map(len, texts))))}
    for count in (20, 1000, MANY):
        index, begun = TextIndex(), time.perf_counter()
        for number in range(count):
            index.put(f"adapter-{number}", profiles[number % len(profiles)])
        made = time.perf_counter() - begun
        times = []
        for text in texts[:200]:
            begun = time.perf_counter()
            index.choose(text)
            times.append(time.perf_counter() - begun)
        begun = time.perf_counter()
        index.put("adapter-7", profiles[0])
        result[str(count)] = {
            "choose_us": 1e6 * float(np.median(times)),
            "load_us": 1e6 * made / count,
            "replace_ms": 1e3 * (time.perf_counter() - begun),
            "table_mb": index._table.nbytes / 1e6,
        }
    return result


def unknown(bundle: Path, asked: Mapping[str, Sequence[str]]) -> dict[str, float]:
    """Seconds to the first token of adapters that the server has never seen, and of a name that is nowhere."""
    server = Server(bundle, "--fetch", str(bundle.parent / "packs"))
    server.ask("auto", "A first request.")
    names = [name for name in asked if name in {pack.name for pack in (bundle.parent / "packs").iterdir()}][
        1:
    ]
    process = psutil.Process(server.process.pid)

    def spent() -> float:
        times = process.cpu_times()
        return float(times.user + times.system)

    begun = spent()
    first = [server.ask(name, "A short prompt.")[1] for name in names]
    between = spent()
    second = [server.ask(name, "A short prompt.")[1] for name in names]
    processor = {"first_cpu_s": between - begun, "again_cpu_s": spent() - between}
    absent = []
    for number in range(50):
        begun = time.perf_counter()
        server.client.post("/v1/completions", json={"model": f"no-{number}", "prompt": "x"})
        absent.append(time.perf_counter() - begun)
    server.close()
    return {
        "adapters": len(names),
        "first_s": float(np.median(first)),
        "first_worst_s": max(first),
        "again_s": float(np.median(second)),
        "absent_s": float(np.median(absent)),
        **{name: seconds / len(names) for name, seconds in processor.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--keep", type=Path, default=Path("build/auto"), help="where adapters are kept")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    bundle, asked, others = prepared(args.keep)
    result = {
        "choices": choices(bundle, asked, others),
        "speed": speed(bundle, asked),
        "unknown": unknown(bundle, asked),
    }
    if args.json:
        print(json.dumps(result))
        return
    found = result["choices"]
    print(
        f"{found['texts']} texts of 20 adapters: right {found['right']:.1%}, to the base {found['base']:.1%}, "
        f"to another adapter {found['wrong']:.1%}; {found['foreign_texts']} of none: to the base "
        f"{found['foreign_base']:.1%}"
    )
    print("   " + ", ".join(f"{name} {share:.0%}" for name, share in found["by_set"].items()))
    for one in found["sure"]:
        print(f"   said {one['said']:.2f} on {one['texts']} texts: right {one['right']:.2f}")
    print("   a request: " + ", ".join(f"{kind} {ms:.1f} ms" for kind, ms in found["request_ms"].items()))
    for count, one in result["speed"].items():
        print(f"   {count}: {one}")
    print(f"   adapters that nobody had loaded: {result['unknown']}")


if __name__ == "__main__":
    main()
