"""Tokenizers and configurations of strangers: whatever is wrong with a file or a row, the error says which
one, and is no bug.
"""

from __future__ import annotations

import base64
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from tokenizers import Tokenizer as Core
from tokenizers import models, normalizers

from adapterpack import Session, run
from adapterpack.bundle.manifest import read_bundle
from adapterpack.cli.main import main
from adapterpack.errors import ConfigError, FormatError, StorageError
from adapterpack.runtime.prompts import start_ids
from adapterpack.runtime.text import model_files, tokenizer
from adapterpack.runtime.text.tokenizer import Tokenizer

Make = Callable[..., Any]
DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "cut": lambda data: data[: len(data) // 2],
    "empty": lambda data: b"",
    "nested": lambda data: b'{"a":' + b"[" * 100_000,
    "a list": lambda data: b"[]",
    "a number": lambda data: b"7",
    "UTF-16": lambda data: data.decode().encode("utf-16"),
    "no UTF-8": lambda data: b'{"a": "\xff"}',
    "twice": lambda data: b'{"eos_token_id": 1, "eos_token_id": 2}',
    "a number of many digits": lambda data: b'{"eos_token_id": ' + b"9" * 5000 + b"}",
}
READ_BY: dict[str, Callable[[Path], Any]] = {
    "tokenizer.json": Tokenizer,
    "tokenizer_config.json": lambda folder: Tokenizer(folder).prompt("w1"),
    "generation_config.json": lambda folder: Tokenizer(folder).eos_ids,
    "config.json": lambda folder: Tokenizer(folder).eos_ids,
}


@pytest.fixture
def copied(bundle_of: Make, tmp_path: Path) -> Path:
    """A copy of a bundle, with every file that describes its model."""
    folder = Path(shutil.copytree(bundle_of("llama", "bank"), tmp_path / "bundle"))
    (folder / "generation_config.json").write_text("{}")
    return folder


def listed_anew(folder: Path) -> Path:
    """The bundle with a manifest that lists its files as they are now: what a stranger could ship."""
    read_bundle(folder).write(folder)
    return folder


def cli(*args: object) -> Result:
    return CliRunner().invoke(main, [str(arg) for arg in args])


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        # keys that nobody reads are the library's own matter
        (name, damage)
        for name in READ_BY
        for damage in DAMAGE
        if name != "tokenizer.json" or damage not in ("twice", "a number of many digits")
    ],
)
def test_a_damaged_file_is_named(name: str, damage: str, copied: Path) -> None:
    """Cut, nested, of another form or in another encoding: an error of the format that names the file."""
    path = copied / name
    path.write_bytes(DAMAGE[damage](path.read_bytes()))
    if name == "config.json":
        (copied / "generation_config.json").unlink()
    with pytest.raises(FormatError, match=name):
        READ_BY[name](copied)


@pytest.mark.parametrize("name", READ_BY)
def test_the_command_names_it_too(name: str, copied: Path) -> None:
    """One sentence that is not about a bug."""
    if name == "config.json":
        (copied / "generation_config.json").unlink()
    (copied / name).write_bytes(b'{"model": 1, ')
    done = cli("run", listed_anew(copied), "--prompt", "w1", "--provider", "cpu", "--max-new-tokens", 2)
    assert done.exit_code == 1
    assert name in done.stderr
    assert "bug" not in done.stderr


def test_a_file_that_is_too_large_is_not_read(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No more than the limit is taken into memory."""
    monkeypatch.setattr(model_files, "MAX_JSON", 1000)
    monkeypatch.setattr(tokenizer, "MAX_TOKENIZER", 1000)
    for name, read in READ_BY.items():
        if name == "config.json":
            (copied / "generation_config.json").unlink()
        kept = (copied / name).read_bytes() if name != "generation_config.json" else b"{}"
        (copied / name).write_bytes(b" " * 2000)
        with pytest.raises(FormatError, match=f"too large.*{name}.*1000"):
            read(copied)
        (copied / name).write_bytes(kept[:900] if name == "tokenizer.json" else b"{}")
        if name == "tokenizer.json":
            monkeypatch.setattr(tokenizer, "MAX_TOKENIZER", 1 << 20)
            (copied / name).write_bytes(kept)


WRONG: list[tuple[str, dict[str, Any], Callable[[Session], Any]]] = [
    ("tokenizer_config.json", {"pad_token": 5}, lambda session: session.pad_id),
    (
        "tokenizer_config.json",
        {"bos_token": ["<s>"], "chat_template": "x"},
        lambda session: session.tokenizer.prompt("w1"),
    ),
    ("tokenizer_config.json", {"mask_token": {"content": 5}}, lambda session: session.tokenizer.mask_token),
    ("tokenizer_config.json", {"chat_template": 5}, lambda session: session.tokenizer.prompt("w1")),
    (
        "tokenizer_config.json",
        {"chat_template": [{"name": "default", "template": 5}]},
        lambda session: session.tokenizer.prompt("w1"),
    ),
    ("generation_config.json", {"eos_token_id": "2"}, lambda session: session.tokenizer.eos_ids),
    ("generation_config.json", {"eos_token_id": [2, 1.5]}, lambda session: session.tokenizer.eos_ids),
    ("generation_config.json", {"eos_token_id": True}, lambda session: session.tokenizer.eos_ids),
    ("generation_config.json", {"eos_token_id": 2**70}, lambda session: session.tokenizer.eos_ids),
    ("config.json", {"eos_token_id": {"a": 1}}, lambda session: session.tokenizer.eos_ids),
    ("generation_config.json", {"decoder_start_token_id": -1}, start_ids),
    ("generation_config.json", {"decoder_start_token_id": 1, "forced_decoder_ids": 5}, start_ids),
    ("generation_config.json", {"decoder_start_token_id": 1, "forced_decoder_ids": [[1, "a"]]}, start_ids),
    ("config.json", {"max_position_embeddings": "64"}, lambda session: session.generate([[5]])),
    ("config.json", {"max_position_embeddings": 0}, lambda session: session.generate([[5]])),
]


@pytest.mark.parametrize(("name", "content", "use"), WRONG)
def test_values_of_wrong_types_are_named(
    name: str, content: dict[str, Any], use: Callable[[Session], Any], copied: Path
) -> None:
    """The file and the key, where it is used."""
    (copied / name).write_text(json.dumps(content))
    session = Session(listed_anew(copied), "cpu")
    with pytest.raises(FormatError, match=name):
        use(session)


def test_templates_by_name_without_a_default(copied: Path) -> None:
    """Entries of no known form are no default, and a chat is not rendered without one; no entries are no
    template.
    """
    for inline in ([], ["a"], [{"name": "rag", "template": "x"}], [{"template": "x"}]):
        (copied / "tokenizer_config.json").write_text(json.dumps({"chat_template": inline}))
        if inline:
            with pytest.raises(FormatError, match="none of the chat templates is the default"):
                assert Tokenizer(copied).template
        else:
            assert Tokenizer(copied).template is None
    (copied / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(FormatError, match=r"chat_template\.jinja"):
        assert Tokenizer(copied).template
    (copied / "chat_template.jinja").write_bytes(b"x" * 300_000)
    with pytest.raises(FormatError, match=r"too large.*chat_template\.jinja"):
        assert Tokenizer(copied).template


def test_an_expression_that_takes_too_long(copied: Path) -> None:
    """What ends in a panic of the library is an error by name."""
    content = json.loads((copied / "tokenizer.json").read_text())
    content["pre_tokenizer"] = {
        "type": "Split",
        "pattern": {"Regex": "(a+)+$"},
        "behavior": "Isolated",
        "invert": False,
    }
    (copied / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(FormatError, match=r"the tokenizer fails on a text.*tokenizer\.json"):
        Tokenizer(copied).encode("a" * 40 + "!")


def grown(*steps: Any) -> Core:
    core = Core(models.WordLevel({"a": 0}, unk_token="a"))
    core.normalizer = normalizers.Sequence(list(steps))
    return core


def charsmap(*texts: str) -> bytes:
    return (4).to_bytes(4, "little") + b"\0\0\0\0" + "".join(f"{text}\0" for text in texts).encode()


def test_rules_that_make_a_text_grow_are_refused(copied: Path) -> None:
    """A text doubled by forty rules, by one rule a million times, or by a table: refused before a text is
    read; ordinary rules are not.
    """
    for core in (
        grown(*[normalizers.Replace("a", "aa")] * 40),
        grown(normalizers.Replace("a", "b" * 10_000)),
        grown(*[normalizers.ByteLevel()] * 40),
        grown(normalizers.Prepend("x" * 10_000)),
    ):
        core.save(str(copied / "tokenizer.json"))
        with pytest.raises(FormatError, match=r"longer.*tokenizer\.json"):
            Tokenizer(copied)
    core = grown(
        normalizers.NFKC(),
        normalizers.Prepend("▁"),
        normalizers.Replace(" ", "▁"),
        normalizers.NFKD(),
        normalizers.ByteLevel(),
    )
    core.save(str(copied / "tokenizer.json"))
    assert Tokenizer(copied).encode("a")
    content = json.loads(core.to_str())
    for texts, bad in ((("a", "ffi"), False), (("a", "b" * 10_000), True)):
        content["normalizer"] = {
            "type": "Precompiled",
            "precompiled_charsmap": base64.b64encode(charsmap(*texts)).decode(),
        }
        (copied / "tokenizer.json").write_text(json.dumps(content))
        if bad:
            with pytest.raises(FormatError, match="longer"):
                Tokenizer(copied)
        else:
            Tokenizer(copied)


# Rows.


BAD_ROWS: list[tuple[dict[str, Any], str]] = [
    ({"prompt": [5, 2**70]}, "does not have"),
    ({"prompt": [5, -1]}, "does not have"),
    ({"prompt": [5, 96]}, "does not have"),
    ({"prompt": "w1 \ud83d"}, "surrogate"),
    ({"messages": [{"role": "user", "content": "\udc00"}]}, "surrogate"),
    ({"messages": [{"role": "user", "content": 5}]}, "the content of a message"),
    ({"messages": [{"role": "user"}]}, "list of messages"),
    ({"prompt": [True, False]}, "a prompt is"),
    ({"prompt": ""}, "no tokens"),
    ({"prompt": [5] * 100}, "longer than the model's context"),
    ({"txt": "w1"}, "a row needs"),
]


@pytest.mark.parametrize(("row", "text"), BAD_ROWS)
def test_a_row_that_cannot_be_run_is_named(
    row: dict[str, Any], text: str, bundle_of: Make, tmp_path: Path
) -> None:
    """By its number to a caller, whatever the batches and adapters; by its line to who wrote the file."""
    folder, good = bundle_of("llama", "bank"), {"prompt": "w1"}
    for size in (1, 4, 16):
        with pytest.raises(ConfigError, match=f"{text}.*row 3") as caught:
            list(
                run(
                    folder,
                    [good, good, row, good],
                    adapters=["alpha", "beta"],
                    provider="cpu",
                    batch_size=size,
                    max_new_tokens=1,
                )
            )
        assert caught.value.code == "config"
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(["", json.dumps(good), " ", json.dumps(row), json.dumps(good)]))
    done = cli("run", folder, "--input", path, "--provider", "cpu", "--max-new-tokens", 1)
    assert done.exit_code == 1
    assert "rows.jsonl, line 4" in done.stderr
    assert "bug" not in done.stderr


def test_a_row_of_a_classifier_is_named(bundle_of: Make, tmp_path: Path) -> None:
    """Texts of encoders, too: half a character, and more tokens than there are positions."""
    path = tmp_path / "rows.jsonl"
    for text, said in (("\ud800", "surrogate"), ("w1 " * 65, "context")):
        path.write_text("\n".join(json.dumps({"text": one}) for one in ("w1", "w2", text)))
        done = cli("run", bundle_of("bert", "bank"), "--input", path, "--provider", "cpu")
        assert done.exit_code == 1
        assert "rows.jsonl, line 3" in done.stderr
        assert said in done.stderr


@pytest.mark.parametrize(
    "line",
    [
        '{"prompt": "w1", "more": ' + "[" * 900 + "]" * 900 + "}",
        "[" * 100_000,
        '{"prompt": ' + "9" * 5000 + "}",
    ],
)
def test_lines_of_no_form(line: str, bundle_of: Make, tmp_path: Path) -> None:
    """Nested too deeply, or a number of too many digits: the line is named."""
    (tmp_path / "rows.jsonl").write_text(f'{{"prompt": "w1"}}\n{line}\n')
    done = cli(
        "run", bundle_of("llama", "bank"), "--input", tmp_path / "rows.jsonl", "--provider", "cpu", "--json"
    )
    assert done.exit_code == 1
    assert "rows.jsonl, line 2" in done.stderr
    assert "bug" not in done.stderr


def test_prompts_under_messages_are_printed(bundle_of: Make, tmp_path: Path) -> None:
    """A text or ids in the place of messages run as a prompt does, and are printed as one."""
    (tmp_path / "rows.jsonl").write_text('{"messages": "w1"}\n{"messages": [5]}\n')
    done = cli(
        "run",
        bundle_of("llama", "bank"),
        "--input",
        tmp_path / "rows.jsonl",
        "--provider",
        "cpu",
        "--max-new-tokens",
        1,
    )
    assert done.exit_code == 0, done.stderr
    assert [line.split(" | ")[1] for line in done.stdout.splitlines()] == ["w1", "5"]


def test_a_bundle_without_a_tokenizer(copied: Path) -> None:
    """It says what is missing where a text is read."""
    (copied / "tokenizer.json").unlink()
    with pytest.raises(StorageError, match=r"no tokenizer.*tokenizer\.json"):
        Session(listed_anew(copied), "cpu").generate(["w1"])
