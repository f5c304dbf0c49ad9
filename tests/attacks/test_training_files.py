"""Attacks by training configurations, overrides and data files."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from attack import Attacks

GOOD = "model_name_or_path: base\ntrain_file: rows.jsonl\noutput_dir: out\n"


def _bomb(levels: int) -> str:
    lines = [f"k{n}: &k{n} [{', '.join([f'*k{n - 1}'] * 9)}]" for n in range(1, levels)]
    return "\n".join(["k0: &k0 [x, x, x, x, x, x, x, x, x]", *lines])


def _merges(levels: int) -> str:
    lines = [f"k{n}: &k{n} {{<<: [{', '.join([f'*k{n - 1}'] * 9)}]}}" for n in range(1, levels)]
    return "\n".join(["k0: &k0 {a: 1, b: 2}", *lines])


FILES: dict[str, tuple[str | bytes, str]] = {
    "aliases of aliases": (_bomb(10), "aliases in full"),
    "merges of merges": (_merges(10), "aliases in full"),
    "an alias of itself": ("r: &r [*r]", "in itself"),
    "an alias of nothing": ("r: *r", "alias"),
    "100,000 keys": ("".join(f"k{n}: 1\n" for n in range(100_000)), "more than"),
    "30 MB": ("# " + "x" * (30 << 20), "larger than"),
    "a list nested 20,000 deep": ("r: " + "[" * 20_000, "nest"),
    "a mapping nested 2,000 deep": ("".join(" " * n + "a:\n" for n in range(2_000)), "larger than"),
    "a mapping nested 900 deep": ("".join(" " * n + "a:\n" for n in range(900)), "nested more than"),
    "a key of keys": ("? " * 5_000 + "a", "nested more than"),
    "a number of 5,000 digits": (GOOD + "r: " + "9" * 5_000, "digits"),
    "a number of 5,000 hexadecimal digits": (GOOD + "r: 0x" + "f" * 5_000, "digits"),
    "a number of 30,000 sixtieths": (GOOD + "r: " + ":".join(["59"] * 20_000), "digits"),
    "a number beyond 2^63": (GOOD + "r: 9223372036854775808", "beyond 2^63"),
    "infinity": (GOOD + "learning_rate: .inf", "out of range"),
    "a rank of infinity": (GOOD + "r: .inf", "wrong type"),
    "a date that never was": (GOOD + "r: 2024-02-31", "wrong type"),
    "a date by its tag": (GOOD + "r: !!timestamp 2024-02-31", "tag"),
    "a Python object": (GOOD + "r: !!python/object/apply:os.system ['touch ../outside/it']", "tag"),
    "a set": (GOOD + "targets: !!set {q_proj}", "tag"),
    "bytes": (GOOD + "targets: !!binary aGFsbG8=", "tag"),
    "a yes that is none": (GOOD + "bf16: !!bool perhaps", "perhaps"),
    "a number that is none": (GOOD + "r: !!int eight", "eight"),
    "a key twice": (GOOD + "r: 8\nr: 9", "twice"),
    "a key twice in two forms": (GOOD + "rank_pattern: {10: 1, 0xa: 2}", "twice"),
    "a list as a key": (GOOD + "[r]: 8", "key"),
    "UTF-16": (GOOD.encode("utf-16"), "utf-8"),
    "zeros": (b"\0" * 1000, "character"),
    "escapes": (b"\x1b[2J: 1", "character"),
    "escapes in a key": (GOOD + '"\\e[2J\\u202e": 1', "unknown key"),
    "a key of 60,000 characters": (GOOD + "k" * 60_000 + ": 1", "YAML"),
    "a text of 100,000 characters": (GOOD + "name: " + "k" * 100_000, "longer than"),
    "a text for targets that repaints": (GOOD + 'r: "\\e]8;;http://x\\e\\\\"', "wrong type"),
    "two documents": (GOOD + "---\nr: 1", "document"),
    "a list": ("- r", "mapping"),
    "nothing": ("", "mapping"),
    "adapters without names": (GOOD + "adapters: [{r: 8}]", "name"),
    "adapters that are numbers": (GOOD + "adapters: [1, 2]", "name"),
    "an adapter out of its folder": (GOOD + "adapters: [{name: ../../outside/it}]", "name"),
    "a name that is a mapping": (GOOD + "adapters: [{name: {a: b}}]", "wrong type"),
    "a method of a list": (GOOD + "method: [lora]", "must be the name of an adapter method"),
}


@pytest.mark.parametrize("attack", FILES)
def test_a_configuration(attacks: Attacks, attack: str) -> None:
    text, words = FILES[attack]
    (attacks.work / "train.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
    attacks.command("train", "train.yaml").refused(words, absent=attacks.work / "out")


OVERRIDES = {
    "deep": ("r=" + "[" * 20_000, "nest"),
    "digits": ("r=" + "9" * 5_000, "digits"),
    "a date": ("r=2024-02-31", "wrong type"),
    "an object": ("r=!!python/name:os.system", "tag"),
    "bomb": ("r=" + "{a: &a [x,x], b: &b [" + "*a," * 30_000 + "]}", "aliases in full"),
    "escapes": ("r=\x1b[2J", "character"),
}


@pytest.mark.parametrize("attack", OVERRIDES)
def test_an_override(attacks: Attacks, attack: str) -> None:
    text, words = OVERRIDES[attack]
    (attacks.work / "train.yaml").write_text(GOOD)
    attacks.command("train", "train.yaml", text).refused(words, absent=attacks.work / "out")


def _row(value: str) -> bytes:
    return b'{"text": "w1 w2"}\n{"text": ' + value.encode() + b"}\n"


ROWS: dict[str, tuple[str, bytes, str]] = {
    "nested 100,000 deep": ("rows.jsonl", _row("[" * 100_000 + "]" * 100_000), "nested too deeply"),
    "nested 200 deep": ("rows.jsonl", _row("[" * 200 + "]" * 200), "nested too deeply"),
    "objects nested 100,000 deep": (
        "rows.jsonl",
        _row('{"a":' * 100_000 + "1" + "}" * 100_000),
        "nested too deeply",
    ),
    "nested over lines": ("rows.jsonl", b'{"a":\n' * 100_000, "nested too deeply"),
    "null before a row": ("rows.jsonl", b'null{"text": "w1"}\n', "must be an object"),
    "null for a row": ("rows.jsonl", b'{"text": "w1"}\nnull\n', "must be an object"),
    "nested in a list": (
        "rows.json",
        b'[{"text": ' + b"[" * 100_000 + b"]" * 100_000 + b"}]",
        "nested too deeply",
    ),
    "nested behind a quote": ("rows.jsonl", b'{"a\\"": ' + b"[" * 100_000, "nested too deeply"),
    "a line of 20 MB": ("rows.jsonl", _row('"' + "w1 " * 7_000_000 + '"'), "too long"),
    "a text of 20 MB in a list": ("rows.json", b'[{"text": "' + b"w1 " * 7_000_000 + b'"}]', "too long"),
    "a field of 20 MB": ("rows.csv", b"text\n" + b"w1 " * 7_000_000, "too long"),
    "a field of 20 MB on many lines": ("rows.csv", b'text\n"' + b"w1\n" * 7_000_000 + b'"\n', "too long"),
    "packed": ("rows.jsonl", gzip.compress(b'{"text": "w1"}\n' * 1000), "packed"),
    "cut": ("rows.jsonl", b'{"text": "w1"}\n{"text": "w', "line 2"),
    "numbers of 5,000 digits": ("rows.jsonl", _row("9" * 5_000), "rows.jsonl"),
    "text in one row, a number in the next": ("rows.jsonl", _row("1"), "rows.jsonl"),
    "UTF-16": ("rows.jsonl", '{"text": "w1"}\n'.encode("utf-16"), "rows.jsonl"),
    "half a surrogate pair": ("rows.jsonl", _row('"\\ud800"'), "rows.jsonl"),
    "zeros": ("rows.jsonl", b"\0" * 10_000, "rows.jsonl"),
    "no rows": ("rows.jsonl", b"\n\n", "rows.jsonl"),
    "no parquet": ("rows.parquet", b"PAR1" + b"\xff" * 100 + b"PAR1", "rows.parquet"),
    "columns that repaint": ("rows.jsonl", b'{"\\u001b[2J\\u202e": 1}\n', "rows.jsonl"),
    "messages that are numbers": ("rows.jsonl", b'{"messages": [1, 2]}\n', "row 1"),
    "messages without content": (
        "rows.jsonl",
        b'{"messages": [{"role": "user"}, {"role": "assistant"}]}\n',
        "row 1",
    ),
}


def _read(name: str) -> None:
    from adapterpack.tasks.task import get_task
    from adapterpack.training.data.load import load_rows

    class Words:
        """Counts words."""

        eos_token_id, bos_token_id, chat_template = 1, 0, None

        def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
            return {"input_ids": [2] * len(text.encode().split())}

    learned = get_task("text-generation").training
    assert learned is not None
    learned.encode(load_rows(name), Words(), 512, name, ())


def _parquet(make: Callable[[], Any]) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        import pyarrow.parquet as pq

        pq.write_table(make(), path, compression="zstd", store_schema=False)

    return write


def _one_text(size: int, rows: int) -> Any:
    """A column whose rows are all the same text, which is stored once and read as often."""
    import pyarrow as pa

    return pa.table(
        {"text": pa.DictionaryArray.from_arrays(pa.array(np.zeros(rows, np.int32)), pa.array(["w" * size]))}
    )


def _nested(levels: int) -> Any:
    import pyarrow as pa

    value: Any = "w1"
    for _ in range(levels):
        value = [value]
    return pa.table({"text": pa.array([value])})


def _wide() -> Any:
    import pyarrow as pa

    return pa.table({f"c{number}": ["w1"] for number in range(2_000)})


PARQUET: dict[str, tuple[Callable[[Path], None], str]] = {
    "a text of 1 MB a million times": (_parquet(lambda: _one_text(1 << 20, 1_000_000)), "too large"),
    "a text of 20 MB": (_parquet(lambda: _one_text(20 << 20, 1)), "too long"),
    "a text of 15 MB a hundred thousand times": (
        _parquet(lambda: _one_text(15 << 20, 100_000)),
        "rows.parquet",
    ),
    "2,000 columns": (_parquet(_wide), "columns"),
    "lists in 45 lists": (_parquet(lambda: _nested(45)), "nested too deeply"),
    "lists in 200 lists": (_parquet(lambda: _nested(200)), "nested"),
    "a footer of zeros": (
        lambda path: path.write_bytes(b"PAR1" + bytes(1000) + (900).to_bytes(4, "little") + b"PAR1") and None,
        "rows.parquet",
    ),
}


@pytest.mark.parametrize("attack", PARQUET)
def test_rows_of_a_parquet_file(attacks: Attacks, attack: str) -> None:
    write, words = PARQUET[attack]
    write(attacks.work / "rows.parquet")
    attacks.call(_read, "rows.parquet").refused(words)


def test_a_good_parquet_file_is_read(attacks: Attacks) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [{"text": f"w{number} " * 50, "more": {"a": [number, number]}} for number in range(20_000)]
    pq.write_table(pa.Table.from_pylist(rows), attacks.work / "rows.parquet", row_group_size=5_000)
    attacks.call(_read, "rows.parquet").harmless()


@pytest.mark.parametrize("attack", ROWS)
def test_rows_of_training_data(attacks: Attacks, attack: str) -> None:
    name, data, words = ROWS[attack]
    (attacks.work / name).write_bytes(data)
    attacks.call(_read, name).refused(words)


def test_what_is_large_and_good_is_read(attacks: Attacks) -> None:
    rows = [{"text": 'w1 [[[[ \\" {{{' * 50, "more": {"a": [1, {"b": [2]}]}} for _ in range(2_000)]
    for name, text in (
        ("rows.jsonl", "\n".join(map(json.dumps, rows))),
        ("rows.json", json.dumps(rows)),
        ("more.json", json.dumps(rows, indent=1)),
    ):
        (attacks.work / name).write_text(text)
        attacks.call(_read, name).harmless()
