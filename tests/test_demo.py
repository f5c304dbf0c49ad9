"""The demo as a user runs it: the real command, the real models, every stage; what it prints is what it
promises.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from chromium import browser, chromium
from demo_command import demo, run
from shipped_schemas import fits
from sites import fetched, logits, npm, opened, served

from adapterpack import Session, export, load
from adapterpack.base.checkpoint import Checkpoint

pytestmark = [pytest.mark.long, pytest.mark.timeout(2400)]  # it trains, on whatever machine this is


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory, minilm: Path) -> dict[str, Any]:
    return demo(tmp_path_factory.mktemp("demo") / "encoder")


def test_accuracy_is_real_on_every_runner(encoder: dict[str, Any]) -> None:
    """Held-out accuracy is clearly above chance and above an untrained head, in torch, merged, and as a bank
    in fp32, int8 and int4.
    """
    for task, scores in encoder["accuracy"].items():
        floor = max(scores["chance"], scores["base_untrained_head"])
        for runner in ("torch", "merged", "onnx_fp32", "onnx_int8", "onnx_int4"):
            assert scores[runner] >= max(0.75, floor + 0.25), (task, runner, scores)


def test_fp32_runners_agree_with_torch(encoder: dict[str, Any]) -> None:
    """float32 on another runtime moves logits by rounding only (below 1e-3 on logits of size 10) and no
    label.
    """
    for task, runners in encoder["parity"].items():
        for runner in ("merged", "onnx_fp32"):
            assert runners[runner]["max_abs"] <= 1e-3, (task, runner)
            assert runners[runner]["label_agreement"] == 1.0


def test_a_mixed_batch_equals_the_single_runs(encoder: dict[str, Any]) -> None:
    """Rows that use the first adapter, the second and none give what each gives alone."""
    assert encoder["mixed_batch_equal"] is True
    assert {row["adapter"] for row in encoder["mixed_batch"]["rows"]} == {"tickets", "reviews", None}


def test_the_server_answers_for_three_adapters(encoder: dict[str, Any]) -> None:
    """By the openai package, each with its own labels and its own pack's digest."""
    served = encoder["served"]
    assert served["client"].startswith("openai ")
    assert [row["adapter"] for row in served["rows"]] == ["tickets", "reviews", "tickets-first-half"]
    for row in served["rows"]:
        pack = load(Path(encoder["output"]) / "packs" / row["adapter"])
        assert row["digest"] == pack.id
        assert row["answer"] in (pack.manifest.task.labels or ())


def test_the_average_of_two_halves_stands_beside_each(encoder: dict[str, Any]) -> None:
    """All three are real classifiers: well above the chance of one in six."""
    composed = encoder["compose"]
    assert min(composed["first_half"], composed["second_half"], composed["average"]) >= 0.4
    assert composed["exact"] is True


def test_the_artifacts_have_sizes_and_the_stages_have_times(encoder: dict[str, Any]) -> None:
    """Quantized artifacts are smaller than what they were made from; every stage was timed."""
    sizes = encoder["sizes"]
    assert sizes["pack tickets-int8"] < 0.5 * sizes["pack tickets"] < 0.05 * sizes["base checkpoint"]
    assert sizes["bundle bank-int4"] < sizes["bundle bank-int8"] < sizes["bundle bank"]
    assert {"train tickets", "compose", "merge", "export bank", "evaluate", "mixed batch"} <= encoder[
        "timings"
    ].keys()


def test_the_report_stands_alone(encoder: dict[str, Any]) -> None:
    """``report.html`` shows the numbers and fetches nothing."""
    page = Path(encoder["report"]).read_text("utf-8")
    assert "tickets" in page and "<table" in page
    assert not any(mark in page for mark in ('src="http', "src='http", "<script src", "url(http", "@import"))


def test_the_result_fits_its_schema(encoder: dict[str, Any]) -> None:
    """It prints what ``report.v1`` says."""
    assert fits(encoder, "report.v1")


def test_the_packs_validate_and_a_flipped_byte_is_named(
    encoder: dict[str, Any], tmp_path: Path, minilm: Path
) -> None:
    """``validate`` ends with 0 on the demo's packs, and with 1 naming the tensor when one byte of it is
    flipped.
    """
    packs = Path(encoder["output"]) / "packs"
    for pack in sorted(packs.iterdir()):
        assert run("validate", str(pack), "--base", str(minilm)).returncode == 0, pack.name
    altered = tmp_path / "altered"
    altered.mkdir()
    for file in (packs / "tickets").iterdir():
        (altered / file.name).write_bytes(file.read_bytes())
    manifest = json.loads((altered / "adapterpack.json").read_text("utf-8"))
    data = bytearray((altered / "adapter_model.safetensors").read_bytes())
    data[-3] ^= 0x10  # inside the last tensor of the file
    (altered / "adapter_model.safetensors").write_bytes(data)
    done = run("validate", str(altered))
    assert done.returncode == 1
    assert any(name in done.stdout for name in manifest["tensors"]), done.stdout


def test_a_merged_checkpoint_is_a_plain_one(encoder: dict[str, Any], minilm: Path) -> None:
    """The merged folder has every tensor of the base under the task model's names, and the head."""
    base, merged = Checkpoint(minilm), Checkpoint(Path(encoder["output"]) / "merged" / "tickets")
    assert set(merged.tensors) == {f"bert.{name}" for name in base.tensors} | {
        "classifier.weight",
        "classifier.bias",
    }


def test_a_taken_output_is_refused_before_any_work(encoder: dict[str, Any]) -> None:
    """The second run into the same folder ends at once with a sentence."""
    done = run("demo", "-o", encoder["output"])
    assert done.returncode == 1
    assert "already exists" in done.stderr


@browser
@npm
def test_rows_in_a_browser(encoder: dict[str, Any], tmp_path: Path, record_property: Any) -> None:
    """The demo's bank as a site: a mixed batch gives Python's logits, and so does a third pack in the place
    of one that is unloaded.
    """
    out, site = Path(encoder["output"]), tmp_path / "site"
    export(out / "bundles" / "bank", (), site, target="web")
    (site / "node_modules").symlink_to(fetched())
    (site / "packs").symlink_to(out / "packs")
    rows = [
        ("Where is my parcel?", None),
        ("Where is my parcel?", "tickets"),
        ("I love this kettle, and I hate its cable.", "reviews"),
    ]
    session = Session(site / "bundle", "cpu")
    with served(site) as address, chromium(tmp_path) as page:
        took = opened(page, site, address)
        for name in (None, "tickets-first-half"):
            if name:
                for side in (session.unload, lambda old: page.run(f"adapterpack.bundle.unload('{old}')")):
                    side("reviews")
                session.load(load(out / "packs" / name))
                page.run(f"adapterpack.bundle.load('packs/{name}/')")
                rows[-1] = ("Where is my parcel?", name)
            expected = session.run(
                session.encode([text for text, _ in rows]), [adapter for _, adapter in rows]
            )["logits"]
            # float32 on another runtime
            np.testing.assert_allclose(logits(page, rows), expected, rtol=1e-6, atol=1e-4)
    record_property("figure", f"the demo's MiniLM in a browser: open after {took:.1f} s")
