"""What the README and the guide show is run as it stands, one block after the other, on tiny models.

A page that does not run here stands in ``ELSEWHERE`` with the test that runs it, or in ``NOT_RUN`` with the
reason; a command of a page that runs, but cannot run on this machine, in ``NOT_HERE``.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from click.testing import CliRunner

sys.path.insert(0, str(Path(__file__).parent))
from pages import ROOT, Block, blocks, name_of, pages, words

from adapterpack.cli.main import main

RUN = (
    "README.md",
    "docs/get-started/first-adapter.md",
    "docs/stages/pack.md",
    "docs/stages/merge.md",
    "docs/stages/compose.md",
    "docs/stages/quantize.md",
    "docs/stages/export.md",
    "docs/stages/evaluate.md",
    "docs/stages/run.md",
    "docs/migrating/mergekit.md",
)
SAMPLE = {"README.md", "docs/stages/pack.md", "docs/stages/compose.md"}
"""Pages that are run by every test run; the others are long."""
ELSEWHERE = {
    "docs/from-peft.md": "tests/test_from_peft_page.py",
    "docs/serve.md": "tests/serving/test_encoders.py",
    "docs/chat.md": "tests/serving/test_chat.py",
    "docs/web.md": "tests/web/test_site.py",
    "docs/model-package.md": "tests/interop/model_package.py",
    "docs/canary.md": "tests/serving/test_conformance.py",
    "docs/stages/port.md": "tests/test_port.py",
    "docs/hub.md": "tests/hub/test_hub.py",
    "docs/files.md": "tests/serving/test_offline_runs.py",
    "docs/train.md": "tests/test_train.py",
    "docs/stages/quantized-bases.md": "tests/guide/test_quantized_bases_page.py",
    "docs/errors.md": "tests/guide/test_pages.py",
    "docs/commands.md": "tests/test_cli.py",
    "docs/api.md": "tests/test_layers.py",
    "docs/api-methods.md": "tests/test_layers.py",
    "docs/configuration.md": "tests/test_doctor.py",
    **{
        f"docs/cookbook/{name}.md": "tests/guide/test_cookbook.py"
        for name in (
            "domain-adaptation",
            "classification",
            "vision-language",
            "qlora",
            "multi-tenant",
            "air-gapped",
            "thousand-adapters",
        )
    },
}
"""Page -> the test that runs what it shows."""
NOT_RUN = {
    "docs/get-started/install.md": "installs packages, and needs a CUDA device",
    "docs/scale.md": (
        "needs several servers, Kubernetes, Ray or Triton; parts of it run in tests/serving and "
        "tests/test_targets.py"
    ),
    "docs/migrating/olive.md": "docs/stages/export.md has the same command, and is run",
    "docs/migrating/vllm.md": "docs/stages/export.md has the same commands, and is run; servers do not end",
}
"""Page -> why nothing of it is run."""
NOT_HERE = {
    "adapterpack demo": "the demo has tests of its own: tests/test_demo.py",
    "adapterpack serve": "does not end; tests/serving and the cookbook's test start servers",
    "curl": "asks the server above",
    "pip": "installs packages",
    "pytest": "this is it",
    "adapterpack merge SmolLM2-Q4_K_M.gguf": "needs a GGUF file: tests/test_merge_gguf.py",
    "adapterpack merge model.onnx": "needs another tool's graph: tests/test_merge_onnx.py",
    "adapterpack export model.onnx": "needs another tool's graph: tests/test_external.py",
    "adapterpack quantize bundle --compare": "takes long: tests/test_compare_quantized.py",
    "adapterpack compose merge.yaml": "needs two full models: tests/test_mergekit_files.py",
    "adapterpack sign packs/tickets --keyless": "asks the public instance of sigstore: tests/test_keyless.py",
    "adapterpack verify packs/tickets --issuer": "is signed above",
    "adapterpack declare": "needs a cast copy of the base: tests/test_identity.py",
}
"""How a command begins -> why it is not run."""
SHORTER = ["max_steps=2", "max_length=48"]
"""Added to trainings."""


def test_every_page_with_commands_is_accounted_for() -> None:
    """A new page is run, or says why not; no reason is left over."""
    shown = {
        name_of(page)
        for page in pages()
        if any(block.language == "python" or block.commands() for block in blocks(page))
    }
    assert shown - {*RUN, *ELSEWHERE, *NOT_RUN} == set()
    assert {*RUN, *ELSEWHERE, *NOT_RUN} - shown == set()
    assert all((ROOT / test).is_file() for test in ELSEWHERE.values())
    commands = [
        command
        for page in pages()
        if name_of(page) in RUN
        for block in blocks(page)
        for command in block.commands()
    ]
    assert [
        reason for reason in NOT_HERE if not any(command.startswith(reason) for command in commands)
    ] == []


@pytest.mark.parametrize(
    "page", [pytest.param(page, marks=() if page in SAMPLE else pytest.mark.long) for page in RUN]
)
def test_what_the_page_shows_runs(page: str, guide_folder: Path) -> None:
    """In order; what Python defines in one block is there in the next. A bundle that a page supposes is made
    before.
    """
    if page in {"docs/stages/run.md", "docs/stages/evaluate.md"}:
        _command("adapterpack export models/MiniLM packs/tickets packs/reviews -o bundle --slots 4")
    if "first-adapter" in page or page == "README.md":
        shutil.rmtree(guide_folder / "packs")
    names: dict[str, object] = {}
    ran = 0
    for block in blocks(ROOT / page):
        if block.language == "python":
            exec(compile(block.text, page, "exec"), names)
            ran += 1
        for command in _commands(block):
            _command(command)
            ran += 1
    assert ran >= 1


def _commands(block: Block) -> list[str]:
    return [
        command
        for command in (block.commands() if block.language == "sh" else ())
        if not any(command.startswith(reason) for reason in NOT_HERE)
    ]


def _command(command: str) -> None:
    """Runs one, and ends with its output where it fails."""
    arguments = words(command)
    if arguments[0] != "adapterpack":
        subprocess.run(arguments, check=True, capture_output=True)
        return
    done = CliRunner().invoke(
        main, [*arguments[1:], *(SHORTER if arguments[1] == "train" else ())], prog_name="adapterpack"
    )
    assert done.exit_code == 0, (command, done.output, done.exception)


def test_configurations_of_other_tools_are_read_as_ours(guide_folder: Path) -> None:
    """The three blocks of the page about axolotl and LLaMA-Factory name the same training."""
    text = (ROOT / "docs" / "migrating" / "axolotl.md").read_text("utf-8")
    rows = '{"instruction": "w1", "input": "", "output": "w2"}\n'
    (guide_folder / "data").mkdir()
    for file in ("rows.jsonl", "data/rows.jsonl"):
        (guide_folder / file).write_text(rows)
    (guide_folder / "data" / "dataset_info.json").write_text('{"orders": {"file_name": "rows.jsonl"}}')
    read = []
    for number, block in enumerate(re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)):
        (guide_folder / f"{number}.yaml").write_text(textwrap.dedent(block))
        done = CliRunner().invoke(
            main, ["train", f"{number}.yaml", "--print-config", "--json"], prog_name="adapterpack"
        )
        assert done.exit_code == 0, done.output
        read.append(done.stdout)
    of_interest = (
        "model_name_or_path",
        "method",
        "max_length",
        "packing",
        "per_device_train_batch_size",
        "num_train_epochs",
        "learning_rate",
        "output_dir",
        "target_modules",
        "r",
    )
    configs = [json.loads(text) for text in read]
    found = [{key: _find(config, key) for key in of_interest} for config in configs]
    # other tools have kernels that keep packed rows apart: their rows are packed where the model does
    assert [one.pop("packing") for one in found] == ["auto", "auto", True]
    assert found[0] == found[1] == found[2]
    assert found[0]["r"] == 8


def test_the_first_configuration_of_the_page_about_training(guide_folder: Path) -> None:
    """A CSV file of one's own becomes a pack."""
    text = (ROOT / "docs" / "train.md").read_text("utf-8")
    (guide_folder / "train.yaml").write_text(
        re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)[0].replace("packs/tickets", "packs/own")
    )
    (guide_folder / "tickets.csv").write_text("text,label\n" + "w1 w2,delivery\nw3 w4,billing\n" * 10)
    _command("adapterpack train train.yaml")
    _command("adapterpack validate packs/own --base models/MiniLM")


def _find(value: object, key: str) -> object:
    """The first value of that key, anywhere in a JSON object."""
    if isinstance(value, dict):
        if key in value:
            return value[key]
        return next((found for each in value.values() if (found := _find(each, key)) is not None), None)
    if isinstance(value, list):
        return next((found for each in value if (found := _find(each, key)) is not None), None)
    return None
