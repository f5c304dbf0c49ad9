"""Runs that are interrupted: checkpoints of the adapter alone, the same pack in the end, and nothing left
behind.
"""

from __future__ import annotations

import io
import json
import logging
import os
import pickle  # noqa: TID251 - a stranger may have planted one
import random
import re
import resource
import shutil
import signal
import sys
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click.testing import CliRunner
from forked import fork_two
from processes import child
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from adapterpack import Pack, attach, train
from adapterpack.cli.main import main
from adapterpack.cli.progress import show_training
from adapterpack.errors import ConfigError, FormatError, MissingExtra, NonFinite, OutputExists, StorageError
from adapterpack.report.live import TrainingPage, serve_page
from adapterpack.training.loop.resuming import RunFolder
from adapterpack.training.loop.steps import Step

KILLED = """
import os, signal, sys, adapterpack
moment = int(sys.argv[2])
adapterpack.train(sys.argv[1], progress=lambda step: step.done == moment and os.kill(os.getpid(), signal.SIGKILL))
"""


DESERTED = """
import os, sys, adapterpack
def leave(step):
    if os.environ["RANK"] == "1" and step.done == 3:
        os._exit(0)
try:
    adapterpack.train(sys.argv[1], progress=leave)
except adapterpack.AdapterpackError as error:
    open(sys.argv[2], "w").write(f"{error} {error.__notes__}")
"""


def rows(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Rows of several lengths."""
    rng = random.Random(seed)
    return [
        {
            "prompt": " ".join(f"w{rng.randrange(90)}" for _ in range(rng.randrange(1, 9))),
            "completion": f"w{rng.randrange(90)}",
        }
        for _ in range(count)
    ]


def write(path: Path, values: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in values))
    return str(path)


def settings(base: Path, folder: Path, **more: Any) -> dict[str, Any]:
    """Two epochs of five steps, dropout, a schedule, accumulation; a checkpoint every third step."""
    return {
        "model_name_or_path": str(base),
        "train_file": write(folder / "rows.jsonl", rows(40)),
        "output_dir": str(folder / "pack"),
        "name": "p",
        "learning_rate": 1e-2,
        "num_train_epochs": 2,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "r": 2,
        "dropout": 0.1,
        "lr_scheduler_type": "cosine",
        "save_steps": 3,
        "logging_steps": 4,
        **more,
    }


def uninterrupted(config: dict[str, Any], folder: Path) -> Pack:
    (pack,) = train({**config, "output_dir": str(folder / "whole")})
    assert not (folder / "whole.checkpoints").exists()
    return pack


def test_a_run_goes_on_after_ctrl_c_to_the_same_pack(tiny_llama: Path, tmp_path: Path) -> None:
    """Ctrl-C in the second epoch ends the run with a checkpoint, which is of the adapter alone and is said to
    be there; the same call ends with the bytes of a run that nobody interrupted. Another run does not go on
    from these checkpoints.
    """
    config = settings(tiny_llama, tmp_path, group_by_length=True)
    # a shell that runs tests in the background lets them ignore it
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt) as interrupt:
            train(
                config, progress=lambda step: os.kill(os.getpid(), signal.SIGINT) if step.done == 6 else None
            )
    finally:
        signal.signal(signal.SIGINT, before)
    (note,) = interrupt.value.__notes__
    assert "the checkpoint of step 7 is kept in" in note
    folder = tmp_path / "pack.checkpoints"
    assert sorted(path.name for path in folder.iterdir()) == ["checkpoint-6", "checkpoint-7", "run.json"]
    with safe_open(folder / "checkpoint-7" / "model.safetensors", "pt") as file:
        assert all("lora_" in name for name in file.keys())  # noqa: SIM118 - no mapping
    assert sum(path.stat().st_size for path in (folder / "checkpoint-7").iterdir()) < 1 << 20
    with pytest.raises(OutputExists, match="checkpoints of another run"):
        train({**config, "learning_rate": 1e-3})
    steps: list[Step] = []
    (pack,) = train(config, progress=steps.append)
    assert [step.done for step in steps] == [8, 9, 10]
    assert not folder.exists()
    assert pack.id == uninterrupted(config, tmp_path).id


@pytest.mark.parametrize("planted", ["", "run.json", "checkpoint-3", "checkpoint-9/model.safetensors"])
def test_training_writes_through_no_link_that_is_planted_beside_its_output(
    tiny_llama: Path, tmp_path: Path, planted: str
) -> None:
    """In the place of the folder of checkpoints, and inside of it: what it leads to stays, and nothing is
    trained.
    """
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / "letter").write_text("mine")
    link = tmp_path / "pack.checkpoints" / planted
    link.parent.mkdir(parents=True, exist_ok=True)
    link.symlink_to(victim / "letter" if link.suffix in {".json", ".safetensors"} else victim)
    with pytest.raises(StorageError, match=f"follows no link.*found a link to {victim}"):
        train(settings(tiny_llama, tmp_path))
    assert [path.name for path in victim.iterdir()] == ["letter"]
    assert (victim / "letter").read_text() == "mine"
    assert not (tmp_path / "pack").exists()


def _foreign_pickle(checkpoint: Path) -> None:
    (checkpoint / "optimizer.pt").write_bytes(pickle.dumps(os.getcwd))


def _weights_without_metadata(checkpoint: Path) -> None:
    save_file({"other": torch.zeros(2)}, checkpoint / "model.safetensors")


def _a_text_as_step(checkpoint: Path) -> None:
    state = json.loads((checkpoint / "trainer_state.json").read_text())
    (checkpoint / "trainer_state.json").write_text(json.dumps({**state, "global_step": "three"}))


def _one_more_file(checkpoint: Path) -> None:
    (checkpoint / "scaler.pt").write_bytes(b"")


@pytest.fixture(scope="module")
def interrupted(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The settings of a run that ended after its first checkpoint."""
    config = settings(tiny_llama, tmp_path_factory.mktemp("interrupted"))

    def stop(step: Step) -> None:
        if step.done == 4:
            raise RuntimeError("the machine stops")

    with pytest.raises(RuntimeError, match="the machine stops"):
        train(config, progress=stop)
    return config


@pytest.mark.parametrize(
    ("alter", "name"),
    [
        (_foreign_pickle, "optimizer.pt"),
        (_weights_without_metadata, "model.safetensors"),
        (_a_text_as_step, "trainer_state.json"),
        (_one_more_file, "scaler.pt"),
    ],
)
def test_a_checkpoint_that_the_run_did_not_write_so_is_not_gone_on_with(
    interrupted: dict[str, Any], tmp_path: Path, alter: Callable[[Path], None], name: str
) -> None:
    """The error names the file, and how to start anew; doing that, it does."""
    folder, kept = Path(f"{interrupted['output_dir']}.checkpoints"), tmp_path / "kept"
    shutil.copytree(folder, kept)
    try:
        alter(folder / "checkpoint-3")
        with pytest.raises(
            FormatError,
            match=f"not as this run wrote it.*checkpoint-3.*found {name}.*remove .* to start anew",
        ):
            train(interrupted)
        assert not Path(interrupted["output_dir"]).exists()
    finally:
        for made in (folder, interrupted["output_dir"]):
            shutil.rmtree(made, ignore_errors=True)
        shutil.copytree(kept, folder)


def test_a_checkpoint_of_another_user_is_not_gone_on_with(
    interrupted: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may be in a folder where everybody may write."""
    owner = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: owner + 1)
    with pytest.raises(StorageError, match=r"pack\.checkpoints.*found a folder of another user"):
        train(interrupted)


def test_a_second_training_of_one_output_stops_at_once(tiny_llama: Path, tmp_path: Path) -> None:
    """Before it trains anything, and without touching the first, which ends as if it had been alone; then the
    folder is free.
    """
    config = settings(tiny_llama, tmp_path)

    def another(step: Step) -> None:
        if step.done in {2, 9}:
            with pytest.raises(StorageError, match="another process is writing this output"):
                RunFolder(config["output_dir"], {"seed": 1}).begin()

    (pack,) = train(config, progress=another)
    assert pack.id == uninterrupted(config, tmp_path).id
    shutil.rmtree(tmp_path / "pack")
    assert RunFolder(config["output_dir"], {}).begin() is None


@pytest.mark.long
@pytest.mark.parametrize("moment", [2, 8])
def test_a_run_goes_on_after_a_kill_to_the_same_pack(tiny_llama: Path, tmp_path: Path, moment: int) -> None:
    """SIGKILL before the first checkpoint, and near the end: the same bytes."""
    config = settings(tiny_llama, tmp_path)
    path = tmp_path / "train.yaml"
    path.write_text(json.dumps(config))
    with child(
        [sys.executable, "-c", KILLED, path, str(moment)], env={**os.environ, "OMP_NUM_THREADS": "1"}
    ) as process:
        assert process.wait(600) == -signal.SIGKILL
    assert not (tmp_path / "pack").exists()
    steps: list[Step] = []
    (pack,) = train(config, progress=steps.append)
    assert steps[0].done == moment // 3 * 3 + 1
    assert pack.id == uninterrupted(config, tmp_path).id


def test_a_checkpoint_that_the_disk_does_not_take(tiny_llama: Path, tmp_path: Path) -> None:
    """torch says nothing of a disk; the error does, and names the checkpoint that is kept. Nothing is left of
    the other, and the same call goes on.
    """
    config, before = settings(tiny_llama, tmp_path), resource.getrlimit(resource.RLIMIT_FSIZE)

    def no_room_for_the_optimizer(step: Step) -> None:
        if step.done == 4:
            resource.setrlimit(resource.RLIMIT_FSIZE, (12_000, before[1]))

    try:
        with pytest.raises(StorageError, match="ulimit -f") as caught:
            train(config, progress=no_room_for_the_optimizer)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "the checkpoint of step 3 is kept" in caught.value.__notes__[0]
    folder = tmp_path / "pack.checkpoints"
    assert sorted(path.name for path in folder.iterdir()) == ["checkpoint-3", "run.json"]
    steps: list[Step] = []
    train(config, progress=steps.append)
    assert steps[0].done == 4
    assert not folder.exists()


@pytest.mark.long
def test_a_checkpoint_that_was_not_finished_is_not_used(tiny_llama: Path, tmp_path: Path) -> None:
    """A kill while a checkpoint is written: the one before it counts, and what is half there goes."""
    config = settings(tiny_llama, tmp_path)

    def stop(step: Step) -> None:
        if step.done == 8:
            raise RuntimeError("the machine stops")

    with pytest.raises(RuntimeError, match="the machine stops"):
        train(config, progress=stop)
    (tmp_path / "pack.checkpoints" / "checkpoint-6" / "trainer_state.json").write_text('{"half')
    steps: list[Step] = []
    train(config, progress=steps.append)
    assert steps[0].done == 4


@pytest.mark.long
def test_the_best_evaluation_is_packed(
    tiny_llama: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """With a learning rate that soon ruins the model, evaluated after each step: the run ends after two that
    are not better than the best, which is what the pack holds.
    """
    config = settings(
        tiny_llama,
        tmp_path,
        eval_file=write(tmp_path / "e.jsonl", rows(8, 1)),
        eval_strategy="steps",
        eval_steps=1,
        early_stopping_patience=2,
        learning_rate=0.5,
        num_train_epochs=20,
        lr_scheduler_type="constant",
    )
    with caplog.at_level(logging.INFO):
        (pack,) = train(config)
    losses = [
        float(line.partition("loss ")[2].partition(",")[0])
        for line in caplog.messages
        if line.startswith("evaluated after step")
    ]
    # the last evaluation is of what is packed
    assert pack.manifest.training["steps"] == len(losses) - 1 < 100
    assert losses[-1] == min(losses)
    assert min(losses[-3:-1]) > losses[-1]


def test_a_loss_that_is_no_number_ends_the_run_at_once(tiny_llama: Path, tmp_path: Path) -> None:
    """Within the step after the one that broke the parameters; the remedy is one of this run's settings."""
    steps: list[Step] = []
    config = settings(
        tiny_llama, tmp_path, learning_rate=1e30, max_grad_norm=0, lr_scheduler_type="constant", dropout=0.0
    )
    with pytest.raises(NonFinite, match=r"NaN or infinite.*step [234]\b.*lower learning_rate") as error:
        train(config, progress=steps.append)
    assert "bf16" not in str(error.value)
    assert not (tmp_path / "pack.checkpoints").exists()


@pytest.mark.parametrize(
    ("more", "error", "words"),
    [
        ({"eval_strategy": "steps"}, ConfigError, "eval_strategy needs evaluations"),
        ({"early_stopping_patience": 2}, ConfigError, "early_stopping_patience needs evaluations"),
        ({"report_to": "tensorbord"}, MissingExtra, "found tensorbord"),
    ],
)
def test_settings_that_do_not_go_together(
    tiny_llama: Path, tmp_path: Path, more: dict[str, Any], error: Any, words: str
) -> None:
    """Refused before the model is loaded."""
    with pytest.raises(error, match=words):
        train(settings(tiny_llama, tmp_path, **more))


def test_the_command_says_what_it_would_do_and_how_far_it_is(tiny_llama: Path, tmp_path: Path) -> None:
    """``--print-config`` gives a configuration that reads back as itself; ``--dry-run`` what is learned and
    how much; a run off a terminal a line every few steps; the pack claims the settings, without a machine's
    paths.
    """
    path = tmp_path / "train.yaml"
    path.write_text(
        json.dumps({**settings(tiny_llama, tmp_path), "lora_r": 2, "r": None} | {})
        .replace('"r": null, ', "")
        .replace(', "r": null', "")
    )
    printed = CliRunner().invoke(main, ["train", str(path), "--print-config", "seed=3"])
    assert printed.exit_code == 0, printed.output
    assert printed.stdout.startswith("# lora_r is read as r\n")
    (tmp_path / "again.yaml").write_text(printed.stdout)
    again = CliRunner().invoke(main, ["train", str(tmp_path / "again.yaml"), "--print-config"])
    assert yaml.safe_load(again.stdout) == yaml.safe_load(printed.stdout)
    assert "seed: 3  # an override" in printed.stdout and "r: 2  # the file's lora_r" in printed.stdout
    assert "seed: 3" in again.stdout and "save_steps: 3" in again.stdout

    dry = CliRunner().invoke(main, ["train", str(path), "--dry-run", "--json"])
    (report,) = json.loads(dry.stdout)["dry_run"]
    assert (report["sites"], report["steps"], report["rows"], report["trained_whole"]) == (14, 10, 40, [])
    assert set(report["memory_estimate"]) == {"base", "adapter_and_optimizer", "activations", "logits", "sum"}
    first = rows(40)[0]
    answer = f"{first['completion']} [EOS]"
    assert float(report["time_estimate"].removesuffix(" s").removeprefix("< ")) < 60
    assert report["first_batch"][0] == [
        {"text": first["prompt"], "learned": False},
        {"text": answer, "learned": True},
    ]
    shown = CliRunner().invoke(main, ["train", str(path), "--dry-run"]).stdout
    assert f"[{answer}]" in shown
    assert not (tmp_path / "pack").exists() and not (tmp_path / "pack.checkpoints").exists()

    done = CliRunner().invoke(main, ["train", str(path), "--live"])
    assert done.exit_code == 0, done.output
    assert re.search(r"^watch the training at http://127\.0\.0\.1:\d+/$", done.stderr, re.MULTILINE)
    lines = [line for line in done.stderr.splitlines() if line.startswith("step ")]
    assert [line.partition(":")[0] for line in lines] == ["step 4 of 10", "step 8 of 10", "step 10 of 10"]
    assert all("tokens/s" in line and line.endswith(" left") for line in lines)
    claimed = json.loads((tmp_path / "pack" / "adapterpack.json").read_text())["training"]["config"]
    again = CliRunner().invoke(main, ["train", str(path)])
    assert (again.exit_code, "with output_dir=..., or remove it" in again.stderr) == (1, True)
    (later,) = json.loads(CliRunner().invoke(main, ["train", str(path), "--dry-run", "--json"]).stdout)[
        "dry_run"
    ]
    assert {**later, "time_estimate": report["time_estimate"]} == report
    assert {"r": 2, "save_steps": 3, "dropout": 0.1, "lr_scheduler_type": "cosine"}.items() <= claimed.items()
    assert str(tmp_path) not in json.dumps(claimed)


@pytest.mark.long
def test_a_process_that_ends_is_told_by_the_others(tiny_llama: Path, tmp_path: Path) -> None:
    """It is no bug of theirs; and the checkpoint from which all go on is named, and whole."""
    (tmp_path / "train.yaml").write_text(
        json.dumps(settings(tiny_llama, tmp_path, save_steps=2, gradient_accumulation_steps=1))
    )
    (tmp_path / "script.py").write_text(DESERTED)
    fork_two(tmp_path / "script.py", str(tmp_path / "train.yaml"), str(tmp_path / "said"))
    said = (tmp_path / "said").read_text()
    assert (
        "another process of this training has ended" in said and "the checkpoint of step 2 is kept" in said
    ), said
    assert sorted(path.name for path in (tmp_path / "pack.checkpoints").iterdir()) == [
        "checkpoint-2",
        "run.json",
    ]


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_step_is_said_once_on_a_terminal(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where a command shows its own bar, the trainer prints none, and no line of its own either."""
    monkeypatch.setattr(sys, "stderr", terminal := _Terminal())
    with show_training("train") as progress:  # as the command does
        train(settings(tiny_llama, tmp_path, logging_steps=1, max_steps=2), progress=progress)
    monkeypatch.undo()
    assert "2/2" in terminal.getvalue()
    assert "grad_norm" not in terminal.getvalue() + "".join(capsys.readouterr())


def test_a_page_shows_how_far_a_training_is(tiny_llama: Path, tmp_path: Path) -> None:
    """Each step is there as soon as it is done, with what was evaluated; who comes by another name of this
    machine reads nothing; the last state stays, and says what came of it.
    """
    held_out = write(tmp_path / "e.jsonl", rows(4, 1))
    shown, pages = TrainingPage("p"), list[str]()

    def read(**headers: str) -> Any:
        return urllib.request.urlopen(urllib.request.Request(address, headers=headers), timeout=60)

    def look(step: Step) -> None:
        with read() as answer:
            assert answer.headers["Refresh"] == "2"
            pages.append(answer.read().decode())
        assert f"<strong>{step.done}</strong><span>of 10, p</span>" in pages[-1]

    shown.progress = look
    with serve_page(shown.write) as address:
        with read() as answer:
            assert "<h1>Training of p</h1>" in answer.read().decode()
        with pytest.raises(urllib.error.HTTPError, match="404"):
            read(Host="evil.example")
        (pack,) = train(
            settings(
                tiny_llama, tmp_path, eval_file=held_out, eval_strategy="steps", eval_steps=2, logging_steps=1
            ),
            progress=shown,
        )
        assert len(pages) == 10
        assert [page.count("<polyline") for page in pages[1:3]] == [1, 2], "the loss, then the learning rate"
        assert "<h2>Evaluation</h2>" in pages[-1] and "<h2>Learning rate</h2>" in pages[-1]
        shown.packs = [{"name": "p", "training": dict(pack.manifest.training), "metrics": []}]
    assert "after 10 steps" in shown.write()
    with pytest.raises(urllib.error.URLError):
        read()


def test_a_page_shows_what_the_model_answers(tiny_llama: Path, tmp_path: Path) -> None:
    """The answers at the end are those of the pack on a fresh base."""
    held_out = rows(4, 1)
    shown = TrainingPage("p")
    (pack,) = train(
        settings(
            tiny_llama,
            tmp_path,
            eval_file=write(tmp_path / "e.jsonl", held_out),
            eval_strategy="steps",
            eval_steps=9,
            eval_samples=2,
            dropout=0.0,
            max_steps=10,
        ),
        progress=shown,
    )
    page = shown.write()
    assert "<h2>Answers at the last evaluation</h2>" in page
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    model = attach(AutoModelForCausalLM.from_pretrained(tiny_llama).eval(), pack)
    for row in held_out[:2]:
        ids = tokenizer(row["prompt"], return_tensors="pt")["input_ids"]
        whole = model.generate(ids, max_new_tokens=64, do_sample=False)[0]
        asked, said = (
            tokenizer.decode(part, skip_special_tokens=True) for part in (ids[0], whole[ids.shape[1] :])
        )
        assert f"<td>{asked}</td>" in page and f"<td>{said}</td>" in page
    with pytest.raises(ConfigError, match=r"eval_samples.*leave it out"):
        train(settings(tiny_llama, tmp_path, output_dir=str(tmp_path / "d"), trainer="dpo", eval_samples=1))


def test_smaller_batches_go_on_from_the_last_checkpoint(tiny_llama: Path, tmp_path: Path) -> None:
    """Where memory runs out in the middle, no row is learned twice or left out, and the losses stay those of
    the larger batches.
    """
    config = settings(tiny_llama, tmp_path, auto_find_batch_size=True, dropout=0.0)
    whole, steps = uninterrupted(config, tmp_path), list[int]()

    def fill(step: Step) -> None:
        steps.append(step.done)
        if steps == [1, 2, 3, 4]:
            torch.empty(1 << 60)

    (pack,) = train(config, progress=fill)
    assert steps == [1, 2, 3, 4, 4, 5, 6, 7, 8, 9, 10]
    claimed = pack.manifest.training["config"]
    assert (claimed["per_device_train_batch_size"], claimed["gradient_accumulation_steps"]) == (2, 4)
    losses = [[point["loss"] for point in one.manifest.training["losses"]] for one in (pack, whole)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


WANDB = """
run, begun = None, []
class Run:
    summary = {}
    def __init__(self, name): self.name = name
    def _label(self, **_): pass
class Config(dict):
    def update(self, *_, **__): pass
config = Config()
def init(name=None, **_):
    global run
    run = Run(name)
    begun.append(name)
def finish():
    global run
    run = None
def log(*_, **__):
    assert run is not None
"""
"""As much of it as transformers calls."""


def test_each_adapter_is_a_run_of_its_own(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where metrics go to W&B, the runs of a sweep bear the names of their packs, and none stays open."""
    (tmp_path / "lib" / "wandb" / "sdk" / "lib").mkdir(parents=True)
    (tmp_path / "lib" / "wandb" / "__init__.py").write_text(WANDB)
    (tmp_path / "lib" / "wandb" / "sdk" / "lib" / "config_util.py").write_text(
        "class ConfigError(Exception): pass"
    )
    monkeypatch.syspath_prepend(str(tmp_path / "lib"))
    packs = train(settings(tiny_llama, tmp_path, report_to="wandb", max_steps=2, r=[1, 2]))
    wandb = sys.modules["wandb"]
    assert wandb.begun == [pack.name for pack in packs] and wandb.run is None
    for name in [name for name in sys.modules if name.partition(".")[0] == "wandb"]:
        del sys.modules[name]


MLFLOW = """
from types import SimpleNamespace
__version__ = "3.0"
utils = SimpleNamespace(validation=SimpleNamespace(MAX_PARAM_VAL_LENGTH=500, MAX_PARAMS_TAGS_PER_BATCH=100))
is_tracking_uri_set, active_run, get_tracking_uri = (lambda: True), (lambda: None), (lambda: "")
def start_run(**_):
    raise ModuleNotFoundError("No module named 'sqlalchemy'")
{client}
"""


@pytest.mark.parametrize(
    ("client", "loaded"), [("MlflowClient = start_run", False), ("MlflowClient = object", True)]
)
def test_a_reporter_without_what_its_store_needs_is_named(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, client: str, loaded: bool
) -> None:
    """Before the base is loaded, where it tells then; else when the training begins. Nothing is left."""
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "mlflow.py").write_text(MLFLOW.format(client=client))
    monkeypatch.syspath_prepend(str(tmp_path / "lib"))
    monkeypatch.delitem(sys.modules, "mlflow", raising=False)
    base = tiny_llama if loaded else tmp_path
    try:
        with pytest.raises(
            MissingExtra,
            match=r"metrics cannot be reported by mlflow: No module named 'sqlalchemy'.*leave report_to out",
        ):
            train(settings(tiny_llama, tmp_path, report_to="mlflow", model_name_or_path=str(base)))
    finally:
        sys.modules.pop("mlflow", None)
    assert not (tmp_path / "pack.checkpoints").exists()
