"""A small cause for every public error: a command or a few lines of Python that end with it, in a folder that
:func:`world` makes.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors.numpy import save_file

import adapterpack
from adapterpack import IA3, LoRA, errors
from adapterpack.adapter_methods import Site, get
from adapterpack.errors import AdapterpackError
from adapterpack.manifest import manifest as m
from adapterpack.pack.pack import Pack, build

SIZES = {"q": (5, 7), "v": (5, 3)}
"""Layer -> features in and out of the bases here."""


class Cause(NamedTuple):
    """``shown`` is what a reader sees and what is run: commands, or Python. ``advice`` says what else leads
    to the error, and what " "helps.
    """

    error: type[AdapterpackError]
    shown: str
    advice: str
    prepare: Callable[[Path], object] = lambda folder: None

    @property
    def is_command(self) -> bool:
        """Whether it is for a shell."""
        return self.shown.startswith("adapterpack ")


def world(folder: Path) -> None:
    """A base, another one of the same shape, two packs of the first, and a key to sign with."""
    for number, name in enumerate(("base", "other")):
        base = folder / "models" / name
        base.mkdir(parents=True)
        save_file(
            {f"net.{key}.weight": _ramp(*reversed(sizes)) + number for key, sizes in SIZES.items()},
            base / "model.safetensors",
            {"format": "pt"},
        )
        (base / "config.json").write_text(json.dumps({"model_type": "net"}))
    identity = _identity(folder / "models" / "base")
    for name in ("tickets", "emails"):
        _pack(name, identity).write(folder / "packs" / name)
    _keys(folder)


def _ramp(*shape: int) -> np.ndarray:
    return (np.arange(1, np.prod(shape) + 1, dtype=np.float32).reshape(shape) - 0.5) / 64


def _pack(name: str, base: Any, **sites: tuple[int, int]) -> Pack:
    adapters = {
        Site(f"net.{key}", *sizes): (
            LoRA(r=2, alpha=3),
            {"lora_A": _ramp(2, sizes[0]), "lora_B": _ramp(sizes[1], 2)},
        )
        for key, sizes in (sites or SIZES).items()
    }
    return build(
        name, get("lora"), adapters, task=m.PackTask("feature-extraction"), base=base, license="apache-2.0"
    )


def _identity(base: Path) -> Any:
    from adapterpack.converting.base import open_base

    return open_base(base).identity()


def _keys(folder: Path) -> None:
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    for name in ("key", "theirs"):
        key = ec.generate_private_key(ec.SECP256R1())
        pem = serialization.Encoding.PEM
        (folder / f"{name}.pem").write_bytes(
            key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
        )
        (folder / f"{name}.pub").write_bytes(
            key.public_key().public_bytes(pem, serialization.PublicFormat.SubjectPublicKeyInfo)
        )


def _flip(path: Path) -> None:
    """Changes the last bit of a file."""
    path.chmod(0o644)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def _hot_base(folder: Path) -> None:
    """A float16 base whose largest weights the adapter lifts above float16's range."""
    base = folder / "models" / "half"
    base.mkdir()
    save_file(
        {
            f"net.{key}.weight": np.full(tuple(reversed(sizes)), 65000, np.float16)
            for key, sizes in SIZES.items()
        },
        base / "model.safetensors",
        {"format": "pt"},
    )
    (base / "config.json").write_text(json.dumps({"model_type": "net"}))
    adapters = {
        Site("net.q", 5, 7): (LoRA(r=1, alpha=1_000_000), {"lora_A": _ramp(1, 5), "lora_B": _ramp(7, 1)})
    }
    build("hot", get("lora"), adapters, task=m.PackTask("feature-extraction"), base=_identity(base)).write(
        folder / "packs" / "hot"
    )


def _scales(folder: Path) -> None:
    adapters = {Site("net.q", 5, 7): (IA3(), {"ia3_l": _ramp(7, 1)})}
    build(
        "scales", get("ia3"), adapters, task=m.PackTask("feature-extraction"), base=m.Base("org/base")
    ).write(folder / "packs" / "scales")


def _signed(folder: Path, **options: Any) -> None:
    adapterpack.sign(folder / "packs" / "tickets", folder / "key.pem", **options)


def _revoked(folder: Path) -> None:
    entries = {adapterpack.load(folder / "packs" / "tickets").id: "trained on data that must be forgotten"}
    value = {"format": "adapterpack.revoked", "version": 1, "entries": entries}
    (folder / "revoked.json").write_text(json.dumps(value))


def _with_certificate(folder: Path) -> None:
    """The signature of a service that vouches with a certificate in place of a key."""
    _signed(folder)
    path = folder / "packs" / "tickets" / "adapterpack.sig.json"
    value = json.loads(path.read_bytes())
    value["verificationMaterial"] = {"certificate": {"rawBytes": "AA=="}, "tlogEntries": [{"logIndex": 1}]}
    path.write_text(json.dumps(value))


def _config(folder: Path) -> None:
    (folder / "train.yaml").write_text("model_name_or_path: models/base\nlearning_rat: 1e-3\n")


def _on_hub(name: str, **settings: Any) -> Callable[[Path], None]:
    def prepare(folder: Path) -> None:
        from huggingface_hub import HfApi

        adapterpack.push(folder / "packs" / "tickets", f"hf://{name}", base_model="org/base")
        if settings:
            HfApi().update_repo_settings(name, **settings)

    return prepare


MODEL = """import torch

model = torch.nn.ModuleDict({"q": torch.nn.Linear(5, 7)})
"""

CAUSES = (
    Cause(
        errors.AdapterpackError,
        MODEL
        + """adapterpack.adapt(model, adapterpack.LoRA(targets=("q",)), "tickets")
adapterpack.adapt(model, adapterpack.LoRA(targets=("q",)), "tickets")
""",
        "The base of all errors below: `except adapterpack.AdapterpackError` catches every error that is "
        "raised on purpose. It is raised itself where no narrower name fits; the sentence says what to do.",
    ),
    Cause(
        errors.FormatError,
        "adapterpack inspect packs/tickets",
        "A byte was changed by accident, a download broke off, or the file was edited. `adapterpack "
        "validate PATH` names the rule and the place ([what each rule means](validator.md)). Get the file "
        "again from where it came; do not edit a manifest by hand.",
        lambda folder: _flip(folder / "packs" / "tickets" / "adapter_model.safetensors"),
    ),
    Cause(
        errors.BaseMismatch,
        "adapterpack merge models/other packs/tickets -o merged",
        "The pack was trained on other weights than these. Find the base that `adapterpack inspect PACK` "
        "names. A cast or quantized copy of that base can be [declared](commands.md#declare); a fine-tune "
        "of it is accepted, at your own risk, with `--allow-structural-base`.",
    ),
    Cause(
        errors.UnknownName,
        "adapterpack compose packs/tickets packs/emails --rule tiess -o both",
        "A misspelt name of a rule, task, scheme, format or node. The message lists what there is; a "
        "plugin that brings the name may not be installed in this environment.",
    ),
    Cause(
        errors.UnknownMethod,
        'from adapterpack.adapter_methods import get\n\nget("lorra")\n',
        "A misspelt method, or a pack whose method comes from a plugin that is not installed here. "
        "`adapterpack methods` lists all.",
    ),
    Cause(
        errors.UnknownAdapter,
        MODEL
        + """adapterpack.adapt(model, adapterpack.LoRA(targets=("q",)), "tickets")
adapterpack.active(model, "tikets")
""",
        "The model or bundle has no adapter of that name. `adapterpack inspect BUNDLE` or "
        "`adapterpack.status(model)` lists what it has; a bank with free slots takes more (`session.load`).",
    ),
    Cause(
        errors.SiteNotFound,
        MODEL + 'adapterpack.adapt(model, adapterpack.LoRA(targets=("q_prj",)), "tickets")\n',
        "`targets` names no module of this model, or a pack names a module that this base lacks. "
        "`adapterpack inspect BASE` shows the names of layers; targets are names or the ends of paths, not "
        "patterns.",
    ),
    Cause(
        errors.Unsupported,
        "adapterpack convert packs/scales -o scales.safetensors --to diffusers",
        "What you asked for cannot be done exactly, so it is refused instead of being done approximately. "
        "The message says what would work.",
        _scales,
    ),
    Cause(
        errors.MissingExtra,
        "adapterpack verify packs/tickets --key key.pub",
        "An optional library is missing. Install the extra that the message names ([all "
        "extras](get-started/install.md)).",
        _signed,
    ),
    Cause(
        errors.ConfigError,
        "adapterpack train train.yaml",
        "A setting is misspelt, out of range, or contradicts another one. `adapterpack train CONFIG "
        "--print-config` shows the configuration as it is read.",
        _config,
    ),
    Cause(
        errors.OutputExists,
        "adapterpack merge models/base packs/tickets -o models/other",
        "Nothing is ever overwritten. Name another output, or remove the old one yourself.",
    ),
    Cause(
        errors.StorageError,
        "adapterpack sign packs/tickets --key keys/team.pem",
        "A missing file, no permission, a full disk. Outputs are written under a temporary name, so "
        "nothing half-written is left.",
    ),
    Cause(
        errors.ProviderError,
        "adapterpack merge models/base packs/tickets -o merged --device tpu",
        "The execution provider or device is unknown, is not in the installed build of ONNX Runtime, did "
        "not start, or would leave nodes to the CPU. Only one package of ONNX Runtime may be installed "
        "([CUDA](get-started/install.md#cuda)).",
    ),
    Cause(
        errors.NonFinite,
        "adapterpack merge models/half packs/hot -o merged --safe",
        "NaN or infinity in a loss, a weight or a logit. In training lower the learning rate or use `bf16` "
        "instead of `fp16`; in a merge choose a wider `--dtype`.",
        _hot_base,
    ),
    Cause(
        errors.ParityError,
        """import dataclasses

from adapterpack.pack import canary

rows = [np.arange(8.0)]
recorded = canary.record(canary.Canary(((1, 2),), (), (), 0.0), rows, [2 * rows[0]])
canary.check(recorded, rows, [2.4 * rows[0]], "packs/tickets")
""",
        "The logits are not those that were recorded: a canary's when the pack was made, or torch's when "
        "the graph was exported. Nothing wrong is published. For an adapter, get the pack again. For an "
        "export, try another `--frontend`, and report the model.",
    ),
    Cause(
        errors.Unsigned,
        "adapterpack verify packs/tickets --key key.pub",
        "There is no `adapterpack.sig.json` beside the pack. Ask the author for it, or sign the pack with "
        "a key of your own after review. The local store keeps packs without signatures: pull with `-o "
        "DIR`.",
    ),
    Cause(
        errors.WronglySigned,
        "adapterpack verify packs/tickets --key theirs.pub",
        "The signature was made with another key, or a file was changed, added or removed after signing. "
        "Do not use the artifact until you know which.",
        _signed,
    ),
    Cause(
        errors.SignatureExpired,
        """from datetime import UTC, datetime

adapterpack.verify("packs/tickets", "key.pub", at=datetime(2031, 1, 1, tzinfo=UTC))
""",
        "The signature was valid until a date that has passed. Ask the signer for a new one.",
        lambda folder: _signed(folder, expires="2030-12-31"),
    ),
    Cause(
        errors.Revoked,
        """import os

os.environ["ADAPTERPACK_REVOKED"] = "revoked.json"
adapterpack.load("packs/tickets")
""",
        "The pack, one of its tensors or files, or the key that signed it is on the list of what was revoked. "
        "Do not use it; ask whoever keeps the list.",
        _revoked,
    ),
    Cause(
        errors.UnsupportedSignature,
        "adapterpack verify packs/tickets --key key.pub",
        "A signature of another kind than you asked for. One under an identity, by sigstore, is verified with "
        "`--identity` and `--issuer`; one by a key with `--key` ([both](stages/pack.md#sign-and-verify)).",
        _with_certificate,
    ),
    Cause(
        errors.CorruptBlob,
        """store = adapterpack.Store("store")
pack = store.add("packs/tickets")
flip(pack.path / "adapter_model.safetensors")  # a failing disk
store.get(pack.id)
""",
        "Bytes in the local store changed after they were written. They were moved aside; pull or add "
        "the pack again, and check the disk.",
    ),
    Cause(
        errors.HubError,
        "adapterpack pull hf://org/pictures -o tickets",
        "The hub cannot be reached, failed after four tries, or what it holds is neither a pack nor a "
        "bundle. Check `HF_ENDPOINT` and the network; [what a hub may do "
        "wrong](hub.md#what-a-hub-may-do-wrong) lists each fault.",
        lambda folder: _not_a_pack(folder),  # noqa: PLW0108 - it is defined below
    ),
    Cause(
        errors.RepoNotFound,
        "adapterpack pull hf://org/tikets -o tickets",
        "A misspelt name, or a private repository that your token may not see: a hub answers both alike. "
        "Check `HF_TOKEN` or `hf auth login`.",
    ),
    Cause(
        errors.GatedRepo,
        "adapterpack pull hf://org/gated -o tickets",
        "The owner wants an agreement before files are read. Ask for access on the hub's page, then use "
        "the token that was granted it.",
        _on_hub("org/gated", gated="manual"),
    ),
    Cause(
        errors.RevisionNotFound,
        "adapterpack pull hf://org/tickets@v9 -o tickets",
        "No such branch, tag or commit in that repository.",
        _on_hub("org/tickets"),
    ),
    Cause(
        errors.HubConflict,
        "adapterpack push packs/emails hf://org/tagged --base-model org/base --tag v1",
        "Somebody was faster, or the tag is taken: tags never move. Pull, look at what changed, and "
        "push again, or choose another tag.",
        lambda folder: adapterpack.push(
            folder / "packs" / "tickets", "hf://org/tagged", base_model="org/base", tag="v1"
        ),
    ),
    Cause(
        errors.HubOffline,
        "adapterpack pull hf://org/new -o tickets",
        "`HF_HUB_OFFLINE=1` is set and the artifact was not pulled on this machine before. [Air-gapped "
        "sites](cookbook/air-gapped.md) move packs as folders.",
    ),
    Cause(
        errors.NothingToDo,
        "adapterpack merge models/base packs/tickets -o merged --weight 0",
        "The result would be the input. A weight of 0, an adapter whose change is zero, or a change that "
        "rounds away in the base's dtype: choose a wider `--dtype`.",
    ),
)
ABSTRACT = {
    errors.TrustError: (
        "`Unsigned`, `WronglySigned`, `SignatureExpired`, `Revoked` and `UnsupportedSignature` are this error."
    )
}
"""Errors that are only ever raised as one of their kinds."""


def _not_a_pack(folder: Path) -> None:
    from huggingface_hub import HfApi

    (folder / "notes.txt").write_text("no adapter")
    HfApi().create_repo("org/pictures")
    HfApi().upload_file(
        path_or_fileobj=folder / "notes.txt", path_in_repo="notes.txt", repo_id="org/pictures"
    )


@contextmanager
def without_library(error: type[AdapterpackError]) -> Iterator[None]:
    """For the error of a missing extra: the library that signatures need cannot be imported, as where it is
    not installed.
    """
    if error is not errors.MissingExtra:
        yield
        return
    gone = {
        name: sys.modules.pop(name)
        for name in list(sys.modules)
        if name.startswith(("cryptography", "adapterpack.pack.trust"))
    }
    sys.modules["cryptography"] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules["cryptography"]
        sys.modules.update(gone)


def names(folder: Path) -> dict[str, Any]:
    """What the lines of Python may use."""
    return {"adapterpack": adapterpack, "np": np, "flip": lambda path: _flip(folder / path)}
