"""Reads and writes PEFT's X-LoRA folders: a classifier that mixes LoRAs token by token, with the LoRAs (arXiv
2402.07148).

PEFT stores the classifier; its configuration names paths of the experts on the disk where it was trained.
This module never follows these paths: it expects the experts as numbered folders in the folder's own
``experts``. The pack is the composition ``xlora(expert0, expert1, ...)``.

PEFT 0.21 mistakes a layer number in a tensor's name for an expert's number: it writes a layer of the
classifier with such a number into that expert's folder, and drops the number. The reader looks for it there.
In the same way the experts in those folders lack layers whose number is another expert's.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...adapter_methods import Arrays
from ...adapter_methods.nodes import Leaf, Node, decode
from ...adapter_methods.nodes.xlora import XLoRA
from ...composing.assemble import assemble
from ...errors import AdapterpackError, FormatError, Unsupported, excerpt
from ...io import TENSORS, SafetensorsFile, strict_json
from ...io.safetensors import pieces
from ...manifest import write_files
from ...pack import METADATA, Pack, build, load
from ...peft import CONFIG, read_config, unknown_sentence
from ...peft.options import unknown_options
from ...tasks import peft_type_of
from .. import FORMATS, BaseModel, ConversionSource, Format, Notes, Reading, bind_to_base, tensors_of
from .peft import write

_TYPE, _NODE = "XLORA", "xlora"
_PREFIX = "base_model.internal_xlora_classifier.layers."
_SETTINGS = {
    "hidden": "hidden_size",
    "depth": "xlora_depth",
    "size": "xlora_size",
    "layerwise": "layerwise_scalings",
    "softmax": "enable_softmax",
    "temperature": "softmax_temperature",
    "softmax_topk": "enable_softmax_topk",
    "scale": "global_scaling_weight",
}
"""The node's settings -> PEFT's keys; ``top_k`` is None in PEFT where it is 0 here."""
_TRAINING = ("xlora_dropout_p", "use_trainable_adapters")
_MOST = 10
"""The most experts: PEFT sorts its configuration by key as text, so the eleventh expert would be read as the
third.
"""
FOLDER = "experts"
TRAINED = (
    "the experts were trained with the classifier: these are right if they are what PEFT's model held at "
    "the end of that training"
)
WHERE = (
    "PEFT looks for the experts from the folder that it runs in: set adapters = {'0': 'OUT/experts/0', ...} "
    "of the config that XLoraConfig.from_pretrained(OUT) gives, and load with "
    "PeftModel.from_pretrained(model, OUT, config=config)"
)


def _detect(path: Path) -> bool:
    try:
        return (path / CONFIG).is_file() and read_config(path / CONFIG).get("peft_type") == _TYPE
    except AdapterpackError:  # the PEFT format, which is tried next, reports the error
        return False


def _read(source: ConversionSource) -> Reading:
    config = read_config(source.path / CONFIG)
    where = source.path / CONFIG
    if source.part is not None:
        raise Unsupported(
            "an X-LoRA is one adapter, without parts to choose from",
            where=source.path,
            remedy="leave --part out",
        )
    count = _experts(config, where)
    settings = {name: config.get(key, getattr(XLoRA(), name)) for name, key in _SETTINGS.items()}
    settings["top_k"] = config.get("top_k_lora") or 0
    if config.get("scaling_pass_value"):
        raise Unsupported(
            "the first pass of this X-LoRA goes through the experts, too",
            where=f"{where}#/scaling_pass_value",
            expected=0,
            found=excerpt(config["scaling_pass_value"]),
            remedy="keep it with PEFT",
        )
    known = dict.fromkeys([*_SETTINGS.values(), *_TRAINING, "top_k_lora", "scaling_pass_value", "adapters"])
    unknown = unknown_options(config, known, (), where)
    notes = (
        *((unknown_sentence(unknown),) if unknown else ()),
        *((TRAINED,) if config.get("use_trainable_adapters") else ()),
    )
    experts = [_expert(source, number) for number in range(count)]
    tree = decode({"kind": _NODE, "of": [{"member": pack.name} for pack in experts], **settings})
    assert isinstance(tree, Node)
    classifier = _classifier(source, tree.settings, bool(config.get("xlora_dropout_p", 0.2)))
    return Reading(assemble(experts, tree, source.name, shared=classifier), notes)


def _experts(config: Mapping[str, Any], where: Path) -> int:
    """Returns the number of experts."""
    named = config.get("adapters")
    if (
        not isinstance(named, dict)
        or not named
        or set(named) != {str(number) for number in range(len(named))}
    ):
        raise FormatError(
            "the experts of an X-LoRA are named by their numbers",
            where=f"{where}#/adapters",
            expected='"0", "1", ...',
            found=", ".join(map(repr, named))[:200] if isinstance(named, dict) else excerpt(named),
        )
    if len(named) > _MOST:
        raise Unsupported(
            "PEFT itself mixes up more experts when it reads this file: it sorts their numbers as text",
            where=f"{where}#/adapters",
            expected=f"at most {_MOST}",
            found=len(named),
            remedy="train it with fewer",
        )
    return len(named)


def _expert(source: ConversionSource, number: int) -> Pack:
    folder = source.path / FOLDER / str(number)
    linked = folder.is_symlink() or folder.parent.is_symlink()
    if linked or not folder.is_dir():
        raise FormatError(
            "PEFT stores an X-LoRA without its experts, and one of them is not in the folder",
            where=source.path,
            expected=f"the expert's own folder as {FOLDER}/{number}",
            found="a link" if linked else "no such folder",
            remedy=f"copy the folder of each expert into it, as {FOLDER}/0, {FOLDER}/1, ... in their order",
        )
    pack = load(folder).renamed(f"expert{number}")
    return bind_to_base(pack, source.base)


def _classifier(source: ConversionSource, settings: XLoRA, dropout: bool) -> Arrays:
    """Returns the classifier's layers under the node's parameter names; the node checks their shapes."""
    own = _tensors(source.path, source)
    made = {}
    for at in range(settings.depth):
        # between two linear layers there is an activation, and possibly dropout
        number = at * (3 if dropout else 2)
        whole = own is not None and f"{_PREFIX}{number}.weight" in own.tensors
        place = own if whole else _tensors(source.path / str(number), source)
        name = f"{_PREFIX}{number}." if whole else _PREFIX
        for leaf in ("weight", "bias"):
            if place is None or f"{name}{leaf}" not in place.tensors:
                raise FormatError(
                    "a layer of the classifier is missing",
                    where=source.path / TENSORS,
                    expected=f"{_PREFIX}{number}.{leaf}",
                    found="no such tensor",
                    remedy="save it again with PEFT, with all folders that it writes",
                )
            made[f"@0/{leaf}_{at}"] = place.read(f"{name}{leaf}")
    return made


def _tensors(folder: Path, source: ConversionSource) -> SafetensorsFile | None:
    """Opens a folder's tensors; returns None if there is no such folder, or if it is a link."""
    if folder.is_symlink() or not folder.is_dir():
        return None
    return tensors_of(folder, source)[0] or SafetensorsFile(folder / TENSORS, private=True)


def _write(pack: Pack, folder: Path, base: BaseModel | None) -> Notes:
    tree = None if pack.manifest.composition is None else decode(pack.manifest.composition.tree)
    members = (
        [child.member for child in tree.children if isinstance(child, Leaf)]
        if isinstance(tree, Node) and tree.kind == _NODE
        else []
    )
    if (
        tree is None
        or isinstance(tree, Leaf)
        or len(members) != len(tree.children)
        or not 0 < len(set(members)) == len(members) <= _MOST
    ):
        raise Unsupported(
            "PEFT's X-LoRA is a classifier over LoRAs, and this pack is not composed so",
            where=pack.where,
            expected=f"xlora(a, b, ...) of at most {_MOST} packs",
            remedy="keep the pack as it is",
        )
    if pack.full():
        raise Unsupported(
            "PEFT's X-LoRA has no place for modules that were trained whole",
            where=pack.where,
            remedy="keep the pack as it is",
        )
    notes = [WHERE]
    for number, member in enumerate(members):
        (folder / FOLDER / str(number)).mkdir(parents=True)
        notes += write(_member(pack, member), folder / FOLDER / str(number), base)
    settings = tree.settings
    config = {
        "peft_type": _TYPE,
        "task_type": peft_type_of(pack.manifest.task.type),
        "base_model_name_or_path": pack.manifest.base.name,
        "revision": pack.manifest.base.commit,
        "inference_mode": True,
        "adapters": {str(number): f"{FOLDER}/{number}" for number in range(len(members))},
        **{key: getattr(settings, name) for name, key in _SETTINGS.items()},
        "top_k_lora": settings.top_k or None,
        "scaling_pass_value": 0.0,
        "use_trainable_adapters": False,
        "xlora_dropout_p": 0.0,
    }
    shared = pack.shared()
    # the factor 2 skips the activation between two linear layers
    tensors = {
        f"{_PREFIX}{2 * at}.{leaf}": shared[f"@0/{leaf}_{at}"]
        for at, leaf in itertools.product(range(settings.depth), ("weight", "bias"))
    }
    write_files(folder, {CONFIG: [strict_json.canonical(config)], TENSORS: pieces(tensors, METADATA)})
    return tuple(dict.fromkeys(notes))


def _member(pack: Pack, member: str) -> Pack:
    """Returns a member of a composed pack as a separate pack."""
    claims = pack.manifest
    method = pack.method.config.methods[member]
    sites = {}
    for adapter in pack.adapters():
        if member in adapter.config.configs:
            params = {
                name.removeprefix(f"{member}/"): value
                for name, value in adapter.params.items()
                if name.startswith(f"{member}/")
            }
            sites[adapter.site] = adapter.config.configs[member], params
    weights = {group.path: group.weight for group in claims.groups}
    return build(member, method, sites, task=claims.task, base=claims.base, weights=weights)


XLORA = FORMATS.register(
    Format(
        "xlora",
        "PEFT's X-LoRA, with the folders of its experts in it as experts/0, experts/1, ...",
        True,
        _detect,
        _read,
        _write,
        rank=80,
    )
)
