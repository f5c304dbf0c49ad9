"""The command line: every command against every promise, and the real process on tiny real models."""

from __future__ import annotations

import json
import os
import pty
import re
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import click
import numpy as np
import pytest
import torch
import transformers
import yaml
from click.testing import CliRunner, Result
from jsonschema import Draft202012Validator
from processes import child
from tokenizers import Tokenizer, models, pre_tokenizers

import adapterpack
from adapterpack.cli.main import COMMANDS, main
from adapterpack.cli.options import parse_pairs
from adapterpack.io.safetensors import SafetensorsFile
from adapterpack.resources import schema

WORDS = [
    "where",
    "is",
    "my",
    "parcel",
    "the",
    "order",
    "came",
    "broken",
    "i",
    "want",
    "money",
    "back",
    "send",
    "two",
    "mugs",
]
HEAVY = {
    "datasets", "huggingface_hub", "jsonschema", "onnx", "onnx_ir", "onnxruntime", "rich", "tokenizers",
    "torch", "transformers", "yaml",
}  # fmt: skip
REPORT = Draft202012Validator(schema("report.v1"))
GROUPS = {"hub": ("serve", "audit")}
NAMES = [
    name
    for command in COMMANDS
    for name in ([f"{command} {inner}" for inner in GROUPS[command]] if command in GROUPS else [command])
]
ADAPTERPACK = (sys.executable, "-m", "adapterpack")
ROOT = Path(adapterpack.__file__).parent


class Called(NamedTuple):
    """A command, and the words that call it."""

    name: str
    command: click.Command


def found(name: str) -> Called:
    command: click.Command | None = main
    for word in name.split():
        assert isinstance(command, click.Group)
        command = command.get_command(click.Context(command), word)
    assert command is not None
    return Called(name, command)


def call(*args: Any) -> Result:
    """The command in this process, where torch is imported already."""
    return CliRunner(env={"TQDM_DISABLE": "1"}).invoke(
        main, [str(arg) for arg in args], prog_name="adapterpack"
    )


def process(*args: Any, **options: Any) -> subprocess.CompletedProcess[str]:
    """The command as users start it."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [*ADAPTERPACK, *map(str, args)]
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, check=False, timeout=300, **options
    )


def report(done: Any) -> Any:
    """The one object on stdout, which fits the schema."""
    assert (done.exit_code if isinstance(done, Result) else done.returncode) == 0, done.stderr
    value = json.loads(done.stdout)
    REPORT.validate(value)
    return value


def sentence(done: Result) -> str:
    """The one line that a named error is: exit code 1, nothing on stdout, no traceback."""
    assert done.exit_code == 1, done.output
    assert done.stdout == ""
    [line] = [line for line in done.stderr.splitlines() if line]
    assert line.startswith("error: ")
    assert line.endswith(".")
    assert "bug" not in line
    return line


@pytest.mark.parametrize(
    "words",
    [
        ["inspect", "W"],
        ["validate", "W"],
        ["validate", "packs/tickets", "--base", "W"],
        ["run", "W", "--prompt", "x"],
        ["serve", "W"],
        ["quantize", "W", "--scheme", "int8", "-o", "x"],
        ["convert", "W", "-o", "x"],
        ["compose", "W", "packs/tickets", "-o", "x"],
        ["export", "packs", "W", "-o", "x"],
        ["merge", "packs", "W", "-o", "x"],
    ],
    ids=" ".join,
)
def test_a_mistyped_path_is_called_a_path(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """First that nothing is there, and the name beside it that is like it; only then what a repository of a
    hub would look like.
    """
    (tmp_path / "packs" / "tickets").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    said = sentence(call(*("packs/tickts" if word == "W" else word for word in words)))
    assert said.startswith(
        "error: there is no such file or folder here (at packs/tickts). To fix it: did you mean "
        "'packs/tickets'?"
    )
    assert "hf://org/name" in said
    assert not (tmp_path / "x").exists()


# --- command x promise --------------------------------------------------------------------------------------


def has_help(called: Called) -> None:
    assert called.command.help
    assert COMMANDS.get(called.name) or called.command.short_help
    assert all(param.help for param in called.command.params if isinstance(param, click.Option))


def has_example(called: Called) -> None:
    """The Example is one that the command itself accepts."""
    lines = re.findall(
        r"^ *adapterpack (.+)$", (called.command.help or "").partition("Example:")[2], re.MULTILINE
    )
    assert lines
    for line in lines:
        words = called.name.split()
        given = shlex.split(line)
        assert given[: len(words)] == words
        called.command.make_context(called.name, given[len(words) :])


def has_json(called: Called) -> None:
    assert any("--json" in param.opts for param in called.command.params)


def has_schema(called: Called) -> None:
    """The schema of reports has what it prints, and its errors."""
    parts = schema("report.v1")["$defs"]
    assert called.name in {
        part["properties"]["command"].get("const")
        for part in parts.values()
        if "command" in part.get("properties", {})
    }
    assert called.name.partition(" ")[0] in parts["error"]["properties"]["command"]["enum"]


def has_twin(called: Called) -> None:
    """adapterpack.NAME is the function, and the first sentence of its docstring is that of the help."""
    twin: Any = adapterpack
    for word in called.name.split():
        twin = getattr(twin, word)
    function = twin._function() if isinstance(twin, ModuleType) else twin
    assert callable(twin)
    assert first_sentence(function.__doc__) == first_sentence(called.command.help)


def refuses_unknown_options(called: Called) -> None:
    done = call(*called.name.split(), "--no-such-option")
    assert done.exit_code == 2
    assert "No such option" in done.stderr
    assert done.stdout == ""


PROMISES: tuple[Callable[[Called], None], ...] = (
    has_help,
    has_example,
    has_json,
    has_schema,
    has_twin,
    refuses_unknown_options,
)


def first_sentence(text: str | None) -> str:
    """Without markup and case: the library writes ``base`` where the command line writes BASE."""
    plain = re.sub(r":\w+:|`", "", " ".join((text or "").split())).casefold()
    return re.split(r"(?<=\.) ", plain)[0]


@pytest.mark.fast
@pytest.mark.parametrize("promise", PROMISES, ids=lambda promise: promise.__name__)
@pytest.mark.parametrize("name", NAMES)
def test_every_command_keeps_every_promise(name: str, promise: Callable[[Called], None]) -> None:
    """command x promise."""
    promise(found(name))


@pytest.mark.fast
def test_every_command_file_is_in_the_table() -> None:
    """A command that is written is a command that is listed, and the listing shows it."""
    written = {
        path.stem
        for path in (ROOT / "cli" / "commands").glob("*.py")
        if "\ndef command(" in path.read_text("utf-8")
    }
    listing = call("--help").stdout.partition("Commands:")[2]
    assert written == set(COMMANDS) == set(re.findall(r"^  ([a-z]+)  ", listing, re.MULTILINE))


@pytest.mark.parametrize("flag", ["--static-cache", "--in-place"])
def test_a_static_cache_is_asked_for_by_its_old_name_too(flag: str, tiny_bert: Path, tmp_path: Path) -> None:
    """Both flags ask for the graph, which an encoder has not; the help shows the new one alone."""
    result = call("export", tiny_bert, "-o", tmp_path / "out", flag)
    assert result.exit_code == 1
    assert "only decoders have a static cache" in result.stderr
    shown = call("export", "--help").stdout
    assert "--static-cache" in shown
    assert "--in-place" not in shown


@pytest.mark.fast
def test_help_imports_nothing_heavy(record_property: Callable[[str, object], None]) -> None:
    """Neither the listing nor the help of any command imports a library that takes long."""
    lines = "; ".join(
        f"main([*{args}], standalone_mode=False)"
        for args in [["--help"], *([*name.split(), "--help"] for name in NAMES)]
    )
    code = f"import sys; from adapterpack.cli.main import main; {lines}; print('modules', *sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    modules = {name.partition(".")[0] for name in done.stdout.splitlines()[-1].split()}
    assert {"adapterpack", "click"} <= modules
    assert not modules & HEAVY
    seconds = []
    for _ in range(5):
        started = time.perf_counter()
        assert process("--help").returncode == 0
        seconds.append(time.perf_counter() - started)
    record_property("help_seconds", statistics.median(seconds))


@pytest.mark.fast
@pytest.mark.parametrize(
    "text",
    [
        "0",
        "-1",
        "10",
        "010",
        "0.5",
        "-0.25",
        "1.",
        ".5",
        "1e3",
        "1.50",
        "0x1f",
        "1_000",
        "12:30",
        "-0",
        "tensor",
        "Tensor",
        "true",
        "yes",
        "on",
        "off",
        "no",
        "null",
        "inf",
        "nan",
        "y",
        "~",
        "",
        "[1, 2]",
        "a b",
        "none",
    ],
)
def test_values_of_options_are_yaml(text: str) -> None:
    """Those too that are read without a reader of YAML."""
    found, wanted = (
        parse_pairs(click.Context(main), click.Option(["--param"]), [f"key={text}"])["key"],
        yaml.safe_load(text),
    )
    assert (type(found), found) == (type(wanted), wanted)


def test_version() -> None:
    assert process("--version").stdout.split() == ["adapterpack,", "version", adapterpack.__version__]


# --- a small world ------------------------------------------------------------------------------------------


class World(NamedTuple):
    """Two bases with two packs each, and the torch models that the packs came from."""

    folder: Path
    bert: Path
    llama: Path
    models: dict[str, Any]

    def pack(self, name: str) -> Path:
        return self.folder / "packs" / name


def write_tokenizer(folder: Path) -> None:
    vocabulary = {word: number for number, word in enumerate(["[PAD]", "[UNK]", "[EOS]", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": "[PAD]",
        "unk_token": "[UNK]",
        "eos_token": "[EOS]",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config), "utf-8")


def trained(model: Any, base: Path, out: Path, heads: tuple[str, ...], rank: int, seed: int) -> Any:
    """A pack with random, clearly non-zero changes, as training would leave them."""
    adapterpack.adapt(model, adapterpack.LoRA(r=rank, modules_to_save=heads), out.name, seed)
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn_like(parameter))
    adapterpack.save(model.eval(), out, base=base)
    return model


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("world")
    bert, llama, kept = folder / "bert", folder / "llama", {}
    torch.manual_seed(1)
    size = {
        "vocab_size": 64,
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
    }
    transformers.BertModel(transformers.BertConfig(**size)).save_pretrained(bert)
    wider = {**size, "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2}
    decoder = transformers.LlamaConfig(**wider, eos_token_id=2, bos_token_id=2, pad_token_id=0)
    transformers.LlamaForCausalLM(decoder).save_pretrained(llama)
    for base in (bert, llama):
        write_tokenizer(base)
    labels = {"num_labels": 3, "id2label": {0: "delivery", 1: "returns", 2: "product"}}
    for seed, name in enumerate(["tickets", "emails"]):
        model = transformers.AutoModelForSequenceClassification.from_pretrained(bert, **labels)
        kept[name] = trained(model, bert, folder / "packs" / name, ("classifier",), 3 + seed, seed)
    for seed, name in enumerate(["orders", "poems"]):
        kept[name] = trained(
            transformers.AutoModelForCausalLM.from_pretrained(llama),
            llama,
            folder / "packs" / name,
            (),
            2 + seed,
            seed,
        )
    return World(folder, bert, llama, kept)


@pytest.fixture(scope="module")
def bank(world: World) -> Path:
    """A bundle of the classifier with both packs, made by the real process."""
    out = world.folder / "bundles" / "bank"
    done = process(
        "export",
        world.bert,
        world.pack("tickets"),
        f"mails={world.pack('emails')}",
        "-o",
        out,
        "--slots",
        4,
        "--json",
    )
    value = report(done)
    assert (value["command"], value["mode"], value["slots"], value["max_rank"]) == ("export", "bank", 4, 4)
    assert [adapter["name"] for adapter in value["adapters"]] == ["tickets", "mails"]
    # NAME=PATH changes no identity
    assert value["adapters"][1]["pack"] == adapterpack.load(world.pack("emails")).id
    assert done.stderr.splitlines()[-1].startswith("proved; ")
    assert "\r" not in done.stderr
    return out


# --- the real process, end to end ---------------------------------------------------------------------------


def test_validate(world: World) -> None:
    """Valid: exit 0, and what was not checked is named; altered by one bit: exit 1, and the tensor is
    named.
    """
    value = report(process("validate", world.pack("tickets"), "--base", world.bert, "--json"))
    assert (value["state"], value["findings"]) == ("valid", [])
    good = process("validate", world.pack("tickets"))
    assert good.returncode == 0
    assert "not checked: base: none was named (--base)" in good.stdout

    altered = world.folder / "altered"
    shutil.copytree(world.pack("tickets"), altered)
    file = SafetensorsFile(altered / "adapter_model.safetensors", private=True)
    name = sorted(file.tensors)[4]
    data = bytearray((altered / "adapter_model.safetensors").read_bytes())
    place = bytes(data).index(file.read(name).tobytes())
    data[place + 5] ^= 1
    (altered / "adapter_model.safetensors").write_bytes(data)
    bad = process("validate", altered)
    assert bad.returncode == 1
    assert f"error AP204 at {name}: " in bad.stdout
    assert "is not valid" in bad.stdout
    value = json.loads(process("validate", altered, "--json").stdout)
    REPORT.validate(value)
    assert [finding["where"] for finding in value["findings"]] == [name]
    assert name in sentence(call("merge", world.bert, altered, "-o", world.folder / "from-altered"))
    assert not (world.folder / "from-altered").exists()


def test_what_strangers_write_cannot_repaint_the_terminal(world: World, tmp_path: Path) -> None:
    """Control and bidirectional characters of a file's name are escaped."""
    shutil.copytree(world.pack("tickets"), tmp_path / "pack")
    (tmp_path / "pack" / "a\u202egnp.\x1b[31m").write_text("x")
    done = process("validate", tmp_path / "pack")
    assert done.returncode == 1
    assert "a\\u202egnp.\\u001b[31m" in done.stdout
    assert not {"\u202e", "\x1b"} & set(done.stdout)


def test_inspect(world: World, bank: Path) -> None:
    """A pack, a bundle and a base, told apart."""
    pack, bundle, base = (
        report(process("inspect", path, "--json")) for path in (world.pack("tickets"), bank, world.bert)
    )
    assert (pack["kind"], pack["name"], pack["ranks"], pack["modules_to_save"]) == (
        "pack",
        "tickets",
        {"3": pack["sites"]},
        ["classifier"],
    )
    assert (bundle["kind"], bundle["slots"]) == ("bundle", 4)
    assert (base["kind"], base["content"]) == ("base", pack["base"]["content"])
    assert "delivery returns product" in process("inspect", world.pack("tickets")).stdout


def test_inspect_writes_a_page(world: World, bank: Path, tmp_path: Path) -> None:
    """Of a pack and of a bundle; it is replaced by the next one, and a file that is no page of ours is
    not.
    """
    for path in (world.pack("tickets"), bank):
        done = call("inspect", path, "--html", tmp_path / "page.html")
        assert done.exit_code == 0 and f"the page is {tmp_path / 'page.html'}" in done.stdout
        page = (tmp_path / "page.html").read_text("utf-8")
        assert adapterpack.inspect(path)["base"]["content"] in page
    (tmp_path / "mine.html").write_text("<p>mine</p>", "utf-8")
    assert "something else is in the place" in sentence(
        call("inspect", bank, "--html", tmp_path / "mine.html")
    )


@pytest.mark.parametrize(
    "command",
    ["inspect nowhere", "audit nowhere", "train nowhere.yaml", "quantize . --compare nowhere.jsonl"],
)
def test_a_page_that_cannot_be_written_costs_no_work(command: str, tmp_path: Path) -> None:
    """The place of the page is tried before anything is read: here there would be nothing to read."""
    (tmp_path / "mine.html").write_text("<p>mine</p>", "utf-8")
    assert "something else is in the place" in sentence(
        call(*command.split(), "--html", tmp_path / "mine.html")
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine.html"]


@pytest.mark.parametrize("kind", ["pack", "bundle", "base"])
def test_inspect_shortens_digests(world: World, bank: Path, kind: str) -> None:
    """People see the first digits of a digest, and with --full all of them; JSON always holds them whole."""
    path = {"pack": world.pack("tickets"), "bundle": bank, "base": world.bert}[kind]
    digests = set(
        re.findall(r"[a-z0-9]+:[0-9a-f]{64}", json.dumps(report(process("inspect", path, "--json"))))
    )
    short, full = (process("inspect", path, *options).stdout for options in ([], ["--full"]))
    assert digests
    for digest in digests:
        scheme, _, digits = digest.partition(":")
        assert f"{scheme}:{digits[:12]}..." in short and digits[:13] not in short
        assert digits in full.replace("\n", "")


def test_the_web_page_says_where_a_digest_is_shown(world: World) -> None:
    """Whole, as the page compares it."""
    page = (Path(__file__).parents[1] / "web" / "page" / "index.html").read_text("utf-8")
    (name, command) = re.findall(r"the <code>(\w+)</code> that <code>adapterpack ([^<]+)</code> shows", page)[
        0
    ]
    shown = process(*shlex.split(command), world.pack("tickets")).stdout
    (digest,) = re.findall(rf"^{name} +(\S+)$", shown, re.MULTILINE)
    assert digest == adapterpack.load(world.pack("tickets")).id


def test_resize_and_extract(world: World) -> None:
    """A pack is made smaller, and comes back out of the checkpoint into which it was merged; both say the
    error.
    """
    small = world.folder / "resized"
    value = report(process("resize", world.pack("tickets"), "--budget", 0.5, "-o", small, "--json"))
    assert value["bytes"] < value["bytes_before"]
    assert 0 < value["lineage"]["params"]["truncation"]["total"] < 1
    assert (
        "relative error"
        in process("resize", world.pack("tickets"), "--rank", 1, "-o", world.folder / "rank-1").stdout
    )
    process("merge", world.bert, world.pack("tickets"), "-o", world.folder / "to-extract")
    out = world.folder / "extracted"
    value = report(process("extract", world.folder / "to-extract", world.bert, "-o", out, "--json"))
    assert value["extract"]["detected"]
    assert value["extract"]["truncation"]["total"] < 1e-3
    text = process(
        "extract", world.folder / "to-extract", world.bert, "--rest", "leave", "-o", world.folder / "left"
    ).stdout
    assert "its rank is" in text
    assert "left as in the base" in text


def test_audit(world: World) -> None:
    """Two trained packs with heads on their base: every site is measured, and the heads' different labels are
    an obstacle that is told.
    """
    page = world.folder / "audit.html"
    value = report(
        process(
            "audit",
            world.pack("tickets"),
            world.pack("emails"),
            "--base",
            world.bert,
            "--html",
            page,
            "--json",
        )
    )
    assert {site["path"] for site in value["sites"]} == {
        each.site.path for each in adapterpack.load(world.pack("tickets")).adapters()
    }
    assert value["skipped"] == []
    assert (
        0
        < value["total"]["fold"]["F16"]["relative_error"]
        < value["total"]["fold"]["BF16"]["relative_error"]
        < 1
    )
    assert [whole["path"] for whole in value["whole"]] == ["classifier"]
    assert "<h2>Every pair</h2>" in page.read_text("utf-8")


def test_compose(world: World) -> None:
    """0.75 D1 - 0.25 D2 at every site, within float32 (1e-6 of the largest entry)."""
    out = world.folder / "composed"
    packs = world.pack("tickets"), f"other={world.pack('emails')}"
    value = report(process("compose", *packs, "--weight", 0.75, "--weight", -0.25, "-o", out, "--json"))
    assert [(parent["name"], parent["weight"]) for parent in value["lineage"]["parents"]] == [
        ("tickets", 0.75),
        ("other", -0.25),
    ]
    one, two, both = (
        {
            a.site.path: a.config.scale
            * a.params["lora_B"].astype(np.float64)
            @ a.params["lora_A"].astype(np.float64)
            for a in adapterpack.load(path).adapters()
        }
        for path in (world.pack("tickets"), world.pack("emails"), out)
    )
    assert one.keys() == both.keys()
    for path, change in both.items():
        expected = 0.75 * one[path] - 0.25 * two[path]
        np.testing.assert_allclose(change, expected, rtol=0, atol=1e-6 * np.abs(expected).max())
    small = world.folder / "small"
    assert "relative error" in process("compose", out, "--rank", 1, "-o", small).stdout
    assert adapterpack.load(small).manifest.groups[0].rank == 1
    ties = process("compose", *packs, "--rule", "ties", "-o", world.folder / "ties", "--json")
    rank = report(ties)["default_rank"]
    assert (rank["rank"], adapterpack.load(world.folder / "ties").manifest.groups[0].rank) == (4, 4)
    assert "warning: the result of the rule ties has no low rank" in ties.stderr
    assert f"{100 * rank['energy_lost']:.1f} %" in ties.stderr
    stored = process(
        "compose", packs[0], f"again={packs[0]}", "--rule", "peft_linear", "-o", world.folder / "stored"
    )
    assert (
        "\nwarning: peft_linear combines the factors" in "\n" + stored.stderr
        and stored.stderr.count("warning: ") == 1
    )


def test_merge(world: World) -> None:
    """W + w s B A, rounded to float32 (half a unit in the last place of numbers below 4 is 2.4e-7)."""
    out = world.folder / "merged"
    done = process("merge", world.bert, world.pack("tickets"), "--weight", 0.5, "-o", out, "--safe", "--json")
    value = report(done)
    assert value["packs"][0]["weight"] == 0.5
    assert re.search(r"^merge: .* of .*$", done.stderr, re.MULTILINE)
    before, after = (
        SafetensorsFile(folder / "model.safetensors", private=True) for folder in (world.bert, out)
    )
    for adapter in adapterpack.load(world.pack("tickets")).adapters():
        change = (
            adapter.config.scale
            * adapter.params["lora_B"].astype(np.float64)
            @ adapter.params["lora_A"].astype(np.float64)
        )
        expected = before.read(adapter.weight).astype(np.float64) + 0.5 * change
        assert np.abs(expected).max() < 4
        # the head brings its model's prefix along
        [name] = [name for name in after.tensors if name.endswith(adapter.weight)]
        np.testing.assert_allclose(after.read(name), expected, rtol=0, atol=2.4e-7)


def test_quantize(world: World, bank: Path) -> None:
    """A pack to int8 and a bundle to int4: smaller, valid, the error told."""
    pack, bundle = world.folder / "tickets-int8", world.folder / "bundles" / "int4"
    value = report(process("quantize", world.pack("tickets"), "-o", pack, "--json"))
    assert value["bytes"] < value["bytes_before"]
    assert 0 < value["quantization"]["relative_error"] < 0.02
    assert "scheme" in call("quantize", bank, "--scheme", "int4", "-o", bundle).stdout
    for path in (pack, bundle):
        assert report(call("validate", path, "--json"))["state"] == "valid"


def test_run_a_classifier(world: World, bank: Path) -> None:
    """Rows of one batch through two adapters and the base: the scores are torch's, within 1e-4."""
    texts = ["where is my parcel", "the order came broken i want money back", "send two mugs"]
    names = ["tickets", "mails", None]
    rows = [{"text": text, "adapter": name, "labels": [7]} for text, name in zip(texts, names, strict=True)]
    lines = "\n".join(map(json.dumps, rows)) + "\n\n"
    out = world.folder / "answers.jsonl"
    done = process("run", bank, "--input", "-", "--provider", "cpu", "--output", out, "--json", input=lines)
    assert report(done) == {"command": "run", "output": str(out), "rows": 3}
    answers = [json.loads(line) for line in out.read_text("utf-8").splitlines()]
    tokenizer = Tokenizer.from_file(str(world.bert / "tokenizer.json"))
    for answer, row, model in zip(answers, rows, ["tickets", "emails", None], strict=True):
        assert {key: answer[key] for key in row} == row
        REPORT.validate({"command": "run", **answer})  # whatever columns a row has of its own
        if model is None:
            assert answer["label"] is None
            continue
        with torch.no_grad():
            scores = torch.softmax(
                world.models[model](torch.tensor([tokenizer.encode(row["text"]).ids])).logits[0], -1
            ).tolist()
        assert list(answer["scores"]) == ["delivery", "returns", "product"]
        np.testing.assert_allclose(list(answer["scores"].values()), scores, rtol=0, atol=1e-4)

    shown = process(
        "run", bank, "--adapter", "tickets", "--adapter", "mails", "--prompt", texts[0], "--prompt", texts[2]
    )
    expected = [[name, text] for text in (texts[0], texts[2]) for name in ("tickets", "mails")]
    assert [line.split(" | ")[:2] for line in shown.stdout.splitlines()] == expected
    printed = process("run", bank, "--adapter", "tickets", "--prompt", texts[0], "--json").stdout.splitlines()
    assert len(printed) == 1
    REPORT.validate(json.loads(printed[0]))
    assert json.loads(printed[0])["scores"] == answers[0]["scores"]


def test_run_a_decoder(world: World) -> None:
    """Greedy tokens of adapters and base in one batch are those of torch's generate."""
    out = world.folder / "bundles" / "llama"
    report(process("export", world.llama, world.pack("orders"), world.pack("poems"), "-o", out, "--json"))
    prompt, count = "please send two mugs", 7
    rows = "\n".join(json.dumps({"prompt": prompt, "adapter": name}) for name in ("poems", None, "orders"))
    done = process("run", out, "--input", "-", "--max-new-tokens", count, "--json", input=rows)
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(answers) == 3, done.stderr
    tokenizer = Tokenizer.from_file(str(world.llama / "tokenizer.json"))
    ids = torch.tensor([tokenizer.encode(prompt).ids])
    for answer in answers:
        REPORT.validate(answer)
        model = world.models[answer["adapter"] or "orders"]
        adapterpack.active(model, answer["adapter"])
        new = model.generate(ids, max_new_tokens=count, do_sample=False)[0, ids.shape[1] :].tolist()
        kept = [token for token in new if token != 2]
        assert answer["completion"] == tokenizer.decode(kept)
        assert (answer["completion_tokens"], answer["finish_reason"]) == (
            len(kept),
            "stop" if 2 in new else "length",
        )
    assert len({answer["completion"] for answer in answers}) == 3

    sampled = (
        "--temperature",
        1.5,
        "--top-k",
        40,
        "--seed",
        4,
        "--repetition-penalty",
        1.2,
        "--stop",
        "bread",
        "--logprobs",
        1,
    )
    [printed] = process(
        "run", out, "--prompt", prompt, "--max-new-tokens", 9, *sampled, "--json"
    ).stdout.splitlines()
    REPORT.validate(json.loads(printed))
    [answer] = adapterpack.Session(out, "cpu").generate(
        [prompt],
        max_new_tokens=9,
        temperature=1.5,
        top_k=40,
        seed=4,
        repetition_penalty=1.2,
        stop="bread",
        logprobs=1,
    )
    assert json.loads(printed)["completion"] == answer.text
    shown = [
        (token["id"], token["logprob"], token["top_logprobs"][0]["id"])
        for token in json.loads(printed)["logprobs"]
    ]
    assert shown == [(choice.token, choice.logprob, choice.top_logprobs[0][0]) for choice in answer.logprobs]


def test_train(world: World) -> None:
    """A configuration and overrides into a pack; names of other tools are translated, and that is said."""
    data, config, out = world.folder / "rows.jsonl", world.folder / "train.yaml", world.folder / "trained"
    labels = ["delivery", "returns"]
    rows = [{"text": " ".join(WORDS[i : i + 4]), "label": labels[i % 2]} for i in range(8)]
    data.write_text("\n".join(map(json.dumps, rows)), "utf-8")
    known = {
        "base_model": str(world.bert),
        "task": "text-classification",
        "train_file": str(data),
        "lora_r": 2,
        "max_steps": 1,
    }
    config.write_text(
        "".join(f"{key}: {value}\n" for key, value in {**known, "output_dir": out}.items()), "utf-8"
    )
    evaluated = ("val_set_size=2", "eval_strategy=steps", "eval_steps=1")
    done = call("train", config, "max_steps=2", *evaluated, "--json", "--html", world.folder / "train.html")
    [pack] = report(done)["packs"]
    assert (pack["name"], pack["ranks"], pack["training"]["steps"]) == ("trained", {"2": pack["sites"]}, 2)
    page = (world.folder / "train.html").read_text("utf-8")
    assert [title for title in ("Loss of trained", "Accuracy of trained") if title not in page] == []
    assert "lora_r is read as r" in done.stderr
    config.write_text(config.read_text("utf-8") + "method: loraa\n", "utf-8")
    assert "did you mean 'lora'?" in sentence(call("train", config, f"output_dir={out}-2"))
    assert not Path(f"{out}-2").exists()


def test_catalogues() -> None:
    """methods and rules, all or one, are read off the registries."""
    assert [method["name"] for method in report(call("methods", "--json"))["methods"]] == list(
        adapterpack.methods()
    )
    assert [rule["name"] for rule in report(call("rules", "--json"))["rules"]] == list(adapterpack.rules())
    assert {"name": "r", "type": "int", "default": 8} in report(call("methods", "lora", "--json"))["methods"][
        0
    ]["hyperparameters"]
    assert "linear" in call("rules").stdout
    assert "did you mean 'lora'?" in sentence(call("methods", "loraa"))
    assert "did you mean 'linear'?" in sentence(call("rules", "liner"))


# --- what goes wrong ----------------------------------------------------------------------------------------


MISSING = (
    "train nowhere", "validate nowhere", "inspect nowhere", "merge nowhere nowhere -o out",
    "merge {bert} nowhere -o out", "audit nowhere", "compose nowhere -o out", "quantize nowhere -o out",
    "export nowhere -o out", "run nowhere --prompt x", "run {bank} --input nowhere",
)  # fmt: skip
WRONG = {
    "validate {tickets} --base nowhere": "there is no such",
    "run {bank} --adapter tikets --prompt x": "did you mean 'tickets'?",
    "run {bank} --provider tpu --prompt x": "unknown provider",
    "run {bank} --prompt x": (
        "no trained head for this task (at text-classification). To fix it: name an adapter"
    ),
    "run {bank} --input {bad} --output out": "line 2",
    "run {bank} --input {empty} --output out": "there are no rows",
    "run {bank} --prompt x --output {bad}": "already exists",
    "compose {tickets} {orders} -o out": "base",
    "compose {tickets} -o out --rule liner": "did you mean 'linear'?",
    "compose {tickets} -o out --param density=0.5": "no such parameter",
    "compose {tickets} -o out --param x=[1": "cannot be read",
    "compose {tickets} -o {bert}": "already exists",
    "merge {llama} {tickets} -o out": "was made for another base",
    "merge {bert} {tickets} -o {llama}": "already exists",
    "merge {bert} {tickets} -o out --weight 1 --weight 2": "every pack needs one weight",
    "merge {bert} {tickets} -o out --dtype float31": "did you mean",
    "export {llama} {tickets} -o out": "was made for another base",
    "export {bert} {tickets} -o {llama}": "already exists",
    "export {bert} {tickets} -o out --mode bnak": "did you mean 'bank'?",
    "export {bert} {tickets} -o out --frontend x": "unknown frontend",
    "quantize {tickets} -o {bert}": "already exists",
    "quantize {tickets} -o out --scheme int9": "did you mean 'int8'?",
    "demo -o {bert}": "already exists",
}


def fingerprint(folder: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in sorted(folder.rglob("*"))}


@pytest.mark.parametrize("line", [*MISSING, *WRONG])
def test_what_is_wrong_is_one_sentence_and_leaves_nothing(
    line: str, world: World, bank: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exit 1 and one sentence; with --json an object on stdout, too; inputs untouched, nothing new."""
    (world.folder / "bad.jsonl").write_text('{"text": "where"}\n{"text"\n', "utf-8")
    (world.folder / "empty.jsonl").write_text("\n", "utf-8")
    places = {
        "bert": world.bert,
        "llama": world.llama,
        "bank": bank,
        "tickets": world.pack("tickets"),
        "orders": world.pack("orders"),
        "bad": world.folder / "bad.jsonl",
        "empty": world.folder / "empty.jsonl",
    }
    monkeypatch.chdir(tmp_path)
    before = fingerprint(world.folder)
    args = shlex.split(line.format(**places))
    told = sentence(call(*args))
    assert WRONG.get(line, "nowhere") in told
    again = call(*args, "--json")
    assert again.exit_code == 1
    value = json.loads(again.stdout)
    REPORT.validate(value)
    assert value["command"] == args[0]
    assert f"error: {value['error']['message']}" == told
    assert fingerprint(world.folder) == before
    assert not list(tmp_path.iterdir())


@pytest.mark.fast
@pytest.mark.parametrize(
    "line",
    [
        "nothing",
        "run b",
        "run b --prompt x --input y",
        "run b --prompt x --batch-size 0",
        "merge a",
        "merge a b -o c --weight heavy",
        "compose a -o b --param x",
        "compose a -o b --param x=1 --param x=2",
    ],
)
def test_wrong_usage_is_exit_2(line: str) -> None:
    done = call(*line.split())
    assert (done.exit_code, done.stdout) == (2, "")
    assert "Usage: adapterpack" in done.stderr


@pytest.mark.fast
def test_a_mistyped_command_has_a_near_name() -> None:
    done = call("trian", "train.yaml")
    assert done.exit_code == 2
    assert done.stderr.endswith("Error: No such command 'trian'. Did you mean 'train'?\n")


@pytest.mark.fast
def test_a_bug_is_told_as_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An exception that is not ours: one line that says so; where it arose only with --traceback."""
    imports = "import click\nfrom adapterpack.cli.options import common_options\n"
    body = (
        "@click.command('doctor')\n@common_options\ndef command(as_json):\n    raise ValueError('x\\x1b')\n"
    )
    (tmp_path / "doctor_command.py").write_text(imports + body, "utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(sys.modules, "adapterpack.cli.commands.doctor", import_module("doctor_command"))
    plain, told, as_json = call("doctor"), call("doctor", "--traceback"), call("doctor", "--json")
    assert plain.exit_code == told.exit_code == as_json.exit_code == 1
    assert plain.stderr.count("\n") == 1
    assert "this is a bug in adapterpack" in plain.stderr
    assert plain.stderr.endswith("ValueError: x\\u001b\n")
    assert "Traceback" in told.stderr
    assert "doctor_command.py" in told.stderr
    assert json.loads(as_json.stdout)["error"]["code"] == "bug"


@pytest.mark.parametrize(
    ("number", "code", "said"),
    [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "ended by SIGTERM")],
)
def test_an_interrupt_leaves_nothing(bank: Path, tmp_path: Path, number: int, code: int, said: str) -> None:
    """A signal in the middle of the work, and at once another: an exit code that says which, one line, an
    object of it, no file.
    """
    # A shell that runs the tests in the background has its children ignore SIGINT; a user's terminal does
    # not.
    program = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); from adapterpack.cli.main "
        "import main; main()"
    )
    args = [
        sys.executable,
        "-c",
        program,
        "run",
        str(bank),
        "--input",
        "-",
        "--output",
        str(tmp_path / "out.jsonl"),
        "--json",
    ]
    with child(args, stdin=subprocess.PIPE, stderr=subprocess.PIPE, stdout=subprocess.PIPE) as running:
        deadline = time.monotonic() + 60
        while not any(tmp_path.iterdir()) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert [path.suffix for path in tmp_path.iterdir()] == [".tmp"]
        running.send_signal(number)
        running.send_signal(number)
        printed, told = running.communicate(timeout=60)
        assert (running.returncode, told) == (code, f"{said}; nothing was left behind\n")
        assert json.loads(printed)["error"]["code"] == "interrupted"
        REPORT.validate(json.loads(printed))
    assert not list(tmp_path.iterdir())


@pytest.mark.fast
@pytest.mark.parametrize("module", ["click", "adapterpack.cli.main", "adapterpack.cli.options"])
def test_an_interrupt_while_the_command_line_is_imported_ends_it_quietly(module: str, tmp_path: Path) -> None:
    """Ctrl-C just when a module is looked for: 130, and one line instead of a traceback."""
    (tmp_path / "sitecustomize.py").write_text(f"""
import os, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == {module!r}:
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Finder())
""")
    package = str(Path(adapterpack.__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-m", "adapterpack", "methods"],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), package])},
    )
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "interrupted; nothing was left behind\n")
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text("utf-8"))["project"]
    assert project["scripts"] == {"adapterpack": "adapterpack.__main__:main"}


@pytest.mark.fast
def test_a_reader_that_goes_away_is_no_error() -> None:
    """adapterpack methods | head -0."""
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [*ADAPTERPACK, "methods"], stdout=writer, stderr=subprocess.PIPE, text=True, check=False
    )
    os.close(writer)
    assert done.stderr == ""


@pytest.mark.fast
def test_output_that_nobody_takes(tmp_path: Path) -> None:
    """On a full disk it is an error that names it; with a closed one, commands do their work, and no file of
    theirs is printed into.
    """
    for args in (["rules", "--json"], ["--version"]):
        with Path("/dev/full").open("w") as full:
            done = subprocess.run(
                [*ADAPTERPACK, *args], stdout=full, stderr=subprocess.PIPE, text=True, check=False
            )
        assert (done.returncode, done.stderr.count("\n")) == (1, 1), done.stderr
        assert "the disk is full (at standard output)" in done.stderr
    command = f"{shlex.join(map(str, ADAPTERPACK))} rules >&- <&-"
    done = subprocess.run(["sh", "-c", command], stderr=subprocess.PIPE, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_progress_is_a_bar_on_a_terminal(world: World, tmp_path: Path) -> None:
    """stderr on a terminal: something that redraws; stdout still holds the object alone."""
    ours, theirs = pty.openpty()
    args = [*ADAPTERPACK, "merge", world.bert, world.pack("tickets"), "-o", tmp_path / "out", "--json"]
    done = subprocess.run(
        args,
        stdout=subprocess.PIPE,
        stderr=theirs,
        text=True,
        check=True,
        env={**os.environ, "TERM": "xterm"},
    )
    os.close(theirs)
    drawn = os.read(ours, 1 << 16).decode()
    os.close(ours)
    assert "\x1b[" in drawn
    assert "merge" in drawn
    REPORT.validate(json.loads(done.stdout))


@pytest.mark.fast
def test_the_schema_refuses_what_no_command_prints() -> None:
    """An object without its command, with an unknown key, or with one too few."""
    good = {
        "command": "validate",
        "kind": "pack",
        "path": "p",
        "id": None,
        "state": "valid",
        "base": None,
        "findings": [],
        "not_checked": [],
    }
    assert REPORT.is_valid(good)
    assert not REPORT.is_valid({**good, "more": 1})
    for key in good:
        assert not REPORT.is_valid({k: v for k, v in good.items() if k != key}), key
