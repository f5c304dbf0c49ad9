"""Adapters whose tensors are not in the file where PEFT keeps them now: pickles, several files, torchtune's
own form.
"""

from __future__ import annotations

import json
import pickle  # noqa: TID251 - what is never run here is written with it
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from click.testing import CliRunner
from noise import shake
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from adapterpack import attach, convert, load, validate
from adapterpack.cli.main import main
from adapterpack.errors import FormatError, Unsupported
from adapterpack.io import torch_file

IDS = torch.tensor([[3, 9, 4, 11, 5]])
TENSORS = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def safe(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """PEFT's folder as it writes it now."""
    folder = tmp_path_factory.mktemp("peft") / "adapter"
    model = peft.get_peft_model(
        AutoModelForCausalLM.from_pretrained(tiny_llama), peft.LoraConfig(target_modules=["q_proj"], r=2)
    )
    shake(model, 0.3, 4).save_pretrained(folder)
    return folder


def _with(safe: Path, folder: Path, **files: Any) -> Path:
    """A folder with PEFT's configuration and these files, each written by a function of its path."""
    folder.mkdir()
    (folder / "adapter_config.json").write_bytes((safe / "adapter_config.json").read_bytes())
    for name, write in files.items():
        write(
            folder
            / name.replace("__", "-")
            .replace("_pt", ".pt")
            .replace("_bin", ".bin")
            .replace("_safetensors", ".safetensors")
        )
    return folder


def _pickled(safe: Path, folder: Path) -> Path:
    return _with(safe, folder, adapter_model_bin=lambda path: torch.save(load_file(safe / TENSORS), path))


def _sharded(safe: Path, folder: Path, count: int = 2) -> Path:
    tensors = sorted(load_file(safe / TENSORS).items())
    half = len(tensors) // 2
    parts = (dict(tensors[:half]), dict(tensors[half:]))
    return _with(
        safe,
        folder,
        **{
            f"adapter_model__0000{number + 1}__of__00002_safetensors": lambda path, part=part: save_file(
                part, path
            )
            for number, part in enumerate(parts[:count])
        },
    )


def _pickled_shards(safe: Path, folder: Path) -> Path:
    _sharded(safe, folder)
    for path in folder.glob("*.safetensors"):
        torch.save(load_file(path), path.with_suffix(".bin"))
        path.unlink()
    (folder / "adapter_model.bin.index.json").write_text('{"metadata": {}, "weight_map": {}}')
    return folder


@pytest.mark.parametrize(
    "make", [_pickled, _sharded, _pickled_shards], ids=["a pickle", "several files", "several pickles"]
)
def test_convert_reads_the_tensors_and_says_so(
    make: Any, safe: Path, tiny_llama: Path, tmp_path: Path
) -> None:
    """The pack gives PEFT's logits; every other command refuses the folder and names convert."""
    folder = make(safe, tmp_path / "other")
    done = convert(folder, tmp_path / "pack", to="pack", base=tiny_llama)
    assert any("pickle" in note or "2 files" in note for note in done.notes)
    assert validate(tmp_path / "pack", base=tiny_llama).findings == ()
    theirs = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_llama), safe)
    ours = attach(AutoModelForCausalLM.from_pretrained(tiny_llama), load(tmp_path / "pack"))
    with torch.no_grad():
        torch.testing.assert_close(ours(IDS).logits, theirs(IDS).logits, atol=1e-6, rtol=0)
    for command in (
        ["validate", folder],
        ["inspect", folder],
        ["merge", tiny_llama, folder, "-o", tmp_path / "merged"],
    ):
        refused = CliRunner().invoke(main, list(map(str, command)))
        assert refused.exit_code == 1
        assert "adapterpack convert" in refused.output.replace("\n", " "), refused.output
    with pytest.raises(Unsupported, match="adapterpack convert"):
        load(folder)


def test_a_file_is_missing_of_several(safe: Path, tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="one of the files with the adapter's tensors is missing"):
        convert(_sharded(safe, tmp_path / "half", count=1), tmp_path / "pack", to="pack")


def test_torchtunes_own_file_is_not_loaded_as_pefts(safe: Path, tmp_path: Path) -> None:
    """The remedy is the command that reads it; the file alone does not tell its alpha."""
    tensors = {"layers.0.attn.q_proj.lora_a.weight": torch.ones(2)}
    folder = _with(safe, tmp_path / "tuned", adapter_0_pt=lambda path: torch.save(tensors, path))
    with pytest.raises(Unsupported, match=r"torchtune.*adapterpack convert"):
        load(folder)
    with pytest.raises(Unsupported, match=r"torchtune.*adapterpack convert FOLDER"):
        convert(folder / "adapter_0.pt", tmp_path / "pack", to="pack")


def test_the_tensors_of_a_file_of_torch_are_those_of_torch(tmp_path: Path) -> None:
    """Every dtype and protocol, views of one storage, turned and empty ones."""
    whole = torch.arange(24.0).reshape(6, 4)
    tensors = {
        "turned": whole.t(),
        "part": whole[2:4, 1:3],
        "one": torch.tensor(3),
        "none": torch.empty(0, 3),
        "parameter": torch.nn.Parameter(torch.ones(2)),
        **{
            str(kind): torch.ones(3).to(kind)
            for kind in (torch.float64, torch.float16, torch.bfloat16, torch.int8, torch.bool)
        },
    }
    for protocol in (2, 3, 4, 5):
        torch.save(tensors, tmp_path / "file.bin", pickle_protocol=protocol)
        found = torch_file.read(tmp_path / "file.bin")
        assert found.keys() == tensors.keys()
        for name, value in tensors.items():
            np.testing.assert_array_equal(found[name].astype(np.float64), value.detach().double().numpy())


class Planted:
    def __reduce__(self) -> Any:
        return print, ("it ran",)


def _rewritten(file: Path, change: Any) -> None:
    with zipfile.ZipFile(file) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        for name, data in change(records).items():
            archive.writestr(name, data)


def _program(data: bytes | None, half: bool = False) -> Any:
    """A change of the records of a file: another program, none, or half of its own."""

    def change(records: dict[str, bytes]) -> dict[str, bytes]:
        (name,) = (one for one in records if one.endswith("data.pkl"))
        own = records.pop(name)
        return (
            records
            if data is None and not half
            else {name: own[: len(own) // 2] if half else data, **records}
        )

    return change


PLANTED = {
    "a call": _program(pickle.dumps({"a": Planted()}, 2)),
    "a call of a program": _program(b"cposix\nsystem\n(Vtouch ran\ntR."),
    "no program": _program(None),
    "half a program": _program(None, half=True),
    "no tensors": _program(pickle.dumps([1], 2)),
    "fewer numbers": lambda records: {
        name: data[:4] if "/data/" in name else data for name, data in records.items()
    },
    "no numbers": lambda records: {name: data for name, data in records.items() if "/data/" not in name},
}


@pytest.mark.parametrize("change", PLANTED.values(), ids=list(PLANTED))
def test_a_pickle_that_is_more_or_less_than_tensors_runs_nothing(
    change: Any,
    safe: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = _pickled(safe, tmp_path / "planted")
    _rewritten(folder / "adapter_model.bin", change)
    monkeypatch.chdir(tmp_path)
    with pytest.raises((Unsupported, FormatError)):
        convert(folder, tmp_path / "pack", to="pack")
    assert "it ran" not in capfd.readouterr().out
    assert not (tmp_path / "ran").exists()
    assert not (tmp_path / "pack").exists()


def test_a_pickle_is_converted_without_torch(safe: Path, tmp_path: Path) -> None:
    """In a process where torch cannot be imported."""
    folder = _pickled(safe, tmp_path / "other")
    code = (
        "import sys; sys.modules['torch'] = None; import json; from adapterpack import convert;"
        "print(len(convert(sys.argv[1], sys.argv[2], to='pack').pack.tensors))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder), str(tmp_path / "pack")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == len(json.loads(json.dumps(list(load_file(safe / TENSORS)))))
