"""``validate --against``: whether a pack acts where somebody else runs it, told by the answers alone."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from adapter_faults import FAULTS, write_packs
from click.testing import CliRunner
from peft import PeftModel
from servers import ANN, Served
from tiny import write_model
from transformers import AutoModelForCausalLM

import adapterpack
from adapterpack.cli.main import main
from adapterpack.errors import (
    AdapterpackError,
    ConfigError,
    MissingExtra,
    StorageError,
    UnknownAdapter,
    Unsupported,
)

GOOD = 10
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def made(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Packs with and without faults. What is asked is the pack ``good``."""
    folder = tmp_path_factory.mktemp("conformance")
    write_packs(tiny_llama, folder, GOOD, strength=4.0)
    return folder


@pytest.fixture(scope="module")
def running(
    tiny_llama: Path, made: Path, launch: Callable[..., Served], tmp_path_factory: pytest.TempPathFactory
) -> Served:
    """A server of all of these packs."""
    bundle = tmp_path_factory.mktemp("bundles") / "faulty"
    adapterpack.export(tiny_llama, [made / "good"], bundle, mode="bank", in_place=True, slots=4, max_rank=8)
    others = [str(path) for path in made.iterdir() if path.name != "good"]
    return launch(bundle, adapters=others)


@pytest.fixture(autouse=True)
def _key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", ANN)


def test_a_pack_acts_on_a_server(running: Served, made: Path) -> None:
    """Without the base, the canary that the pack carries is all that is needed."""
    report = adapterpack.validate(made / "good", against=running.address)
    assert (report.state, report.findings) == ("valid", ())
    assert report.evidence is not None
    assert report.evidence.startswith(
        f"good at {running.address}: its answers without the adapter are less than 0.1% "
    )


@pytest.mark.parametrize("fault", [*FAULTS, "other"])
def test_every_fault_is_found(running: Served, made: Path, fault: str) -> None:
    report = adapterpack.validate(made / "good", against=running.address, model=f"fault-{fault}")
    (finding,) = report.findings
    assert report.state == "invalid"
    assert finding.rule == ("AC201" if fault == "nothing" else finding.rule)
    assert finding.rule in ("AC201", "AC202", "AC203")


@pytest.mark.parametrize("number", range(GOOD))
def test_nothing_is_found_where_nothing_is_wrong(running: Served, made: Path, number: int) -> None:
    assert adapterpack.validate(made / f"good-{number}", against=f"{running.address}/v1").state == "valid"


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("twice", "2 times as strong"),
        ("halved", "0.5 times as strong"),
        ("rslora", "2.83 times as strong, as with rsLoRA"),
        ("undivided", "8 times as strong, as if alpha were not divided by the rank"),
        ("no-q", "without what it has at q_proj"),
        ("first-half", "without the first half of its layers"),
        ("second-half", "without the second half of its layers"),
    ],
)
def test_with_the_base_the_usual_faults_are_named(
    running: Served, made: Path, tiny_llama: Path, fault: str, said: str
) -> None:
    report = adapterpack.validate(made / "good", tiny_llama, against=running.address, model=f"fault-{fault}")
    (finding,) = report.findings
    assert (finding.rule, finding.message) == ("AC202", f"the adapter acts, but {said}")


@pytest.mark.parametrize("fault", [None, *FAULTS, "other"])
def test_peft_in_this_process_is_asked_with_the_adapter_and_without(
    made: Path, tiny_llama: Path, fault: str | None
) -> None:
    """What PEFT loads is the pack's own folder; the adapter is on again afterwards."""
    loaded = made / ("good" if fault is None else f"fault-{fault}")
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_llama), loaded)
    report = adapterpack.validate(made / "good", against=model)
    assert report.state == ("valid" if fault is None else "invalid")
    assert not model.base_model.model.model.layers[0].self_attn.q_proj.disable_adapters


def test_the_folder_of_a_library_that_is_not_here_says_what_to_install(made: Path, tmp_path: Path) -> None:
    (tmp_path / "genai_config.json").write_text("{}")
    with pytest.raises(MissingExtra, match="pip install onnxruntime-genai"):
        adapterpack.validate(made / "good", against=tmp_path)
    (tmp_path / "genai_config.json").rename(tmp_path / "adapters.safetensors")
    with pytest.raises(ConfigError, match="MLX runs this adapter on a base"):
        adapterpack.validate(made / "good", against=tmp_path)


def test_a_merged_checkpoint_is_told_from_one_that_was_merged_to_nothing(
    made: Path, tiny_llama: Path, tmp_path: Path
) -> None:
    """It cannot be asked without the adapter, so the base is needed."""
    for name in ("good", "fault-no-v"):
        adapterpack.merge(tiny_llama, [made / name], tmp_path / name)
    with pytest.raises(ConfigError, match="cannot be asked without the adapter"):
        adapterpack.validate(made / "good", against=str(tmp_path / "good"))

    def rules(merged: Path) -> list[str]:
        report = adapterpack.validate(made / "good", tiny_llama, against=str(merged))
        return [finding.rule for finding in report.findings]

    assert rules(tmp_path / "good") == []
    assert rules(tiny_llama) == ["AC201"]
    assert rules(tmp_path / "fault-no-v") == ["AC202"]


def test_another_base_is_told(
    running: Served, smollm2: Path, tmp_path: Path, launch: Callable[..., Served]
) -> None:
    """Two models of one shape; the second one is served, under the pack that belongs to the first one."""
    first, second = (write_model(tmp_path / name, smollm2, seed=seed) for name, seed in (("a", 5), ("b", 6)))
    for base in (first, second):
        write_packs(base, tmp_path / f"packs-{base.name}", 0)
    bundle = tmp_path / "bundle"
    adapterpack.export(second, [tmp_path / "packs-b/good"], bundle, mode="bank", in_place=True)
    report = adapterpack.validate(tmp_path / "packs-a/good", against=launch(bundle).address)
    assert [finding.rule for finding in report.findings] == ["AC101"]


def test_another_chat_template_is_told(smollm2: Path, tmp_path: Path, launch: Callable[..., Served]) -> None:
    """The adapter acts as it should, and yet a chat is not what it was trained on."""
    base = write_model(tmp_path / "base", smollm2, seed=5)
    write_packs(base, tmp_path / "packs", 0)
    shutil.copytree(base, tmp_path / "other")
    template = tmp_path / "other/chat_template.jinja"
    template.write_text(template.read_text().replace("a helpful AI", "a terse"))
    found = []
    for served in (base, tmp_path / "other"):
        bundle = tmp_path / f"bundle-{served.name}"
        adapterpack.export(served, [tmp_path / "packs/good"], bundle, mode="bank", in_place=True)
        report = adapterpack.validate(tmp_path / "packs/good", base, against=launch(bundle).address)
        assert report.state == "valid"
        found.append([(one.rule, one.message) for one in report.findings])
    message = (
        "it writes 'terse assistant named SmolLM, trained by Hugging Face<|im_end|>\\n<|im_start|>us where the "
        "base's chat template writes 'helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\\n<|im_star"
    )
    assert found == [[], [("AC103", message)]]


def test_the_command_prints_what_was_measured(running: Served, made: Path) -> None:
    ask = ["validate", str(made / "good"), "--against", running.address]
    result = CliRunner().invoke(main, ask)
    assert result.exit_code == 0, result.output
    assert "at 16 tokens" in result.output
    result = CliRunner().invoke(main, [*ask, "--model", "fault-nothing", "--json"])
    assert result.exit_code == 1
    assert [one["rule"] for one in json.loads(result.output)["findings"]] == ["AC201"]


def test_others_can_check_it_in_a_page(running: Served, made: Path) -> None:
    """The example needs nothing of this package, and finds what the command finds."""

    def said(name: str) -> tuple[int, str]:
        manifest = made / (name if name.startswith("good") else "good") / "adapterpack.json"
        command = [
            sys.executable,
            "-S",
            str(ROOT / "examples/check_canary.py"),
            str(manifest),
            running.address,
            name,
        ]
        ended = subprocess.run(command, capture_output=True, text=True, check=False)
        assert not ended.stderr
        return ended.returncode, ended.stdout.strip()

    assert all(said(f"good-{number}") == (0, "acts as recorded") for number in range(3))
    assert said("fault-nothing") == (1, "no effect")
    assert all(said(f"fault-{fault}")[0] == 1 for fault in ("twice", "no-q", "transposed"))


@pytest.mark.parametrize(
    "answer",
    [
        {"choices": []},
        {"choices": [{"prompt_logprobs": []}]},
        {"choices": [{"prompt_logprobs": [{"-5": {"logprob": -1.0}}]}]},
        {"choices": [{"prompt_logprobs": [{"5": {"logprob": 1e300}}]}]},
        {"choices": [{"prompt_logprobs": [{"999999999": {"logprob": -1.0}}]}]},
        [],
    ],
)
def test_answers_of_strangers_are_read_with_care(made: Path, tiny_llama: Path, answer: Any) -> None:
    """Whatever a server answers, the end is an error or a finding of this package's."""

    class Stranger(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            models = {"data": [{"id": "good", "parent": "base"}, {"id": "base"}]}
            self._tell(models if self.path == "/v1/models" else {})

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self._tell(answer)

        def _tell(self, value: Any) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps(value).encode())

        def log_message(self, *_: Any) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Stranger) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        try:
            for base in (None, tiny_llama):
                try:
                    report = adapterpack.validate(
                        made / "good", base, against=f"http://127.0.0.1:{server.server_port}"
                    )
                except AdapterpackError:
                    continue
                assert report.state == "invalid"
        finally:
            server.shutdown()


def test_what_cannot_be_asked_is_said(running: Served, made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good = made / "good"
    with pytest.raises(UnknownAdapter, match="did you mean 'good'"):
        adapterpack.validate(good, against=running.address, model="god")
    with pytest.raises(StorageError, match="does not answer"):
        adapterpack.validate(good, against="http://127.0.0.1:9")
    with pytest.raises(ConfigError, match="only what runs a pack has a name"):
        adapterpack.validate(good, model="good")
    monkeypatch.setenv("OPENAI_API_KEY", "wrong")
    with pytest.raises(Unsupported, match="401"):
        adapterpack.validate(good, against=running.address)
