"""The model card of a pack or a bundle, rendered from what its manifest says and from nothing else."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ..pack import manifest as m
from ..pack.checks.finding import Report
from ..pack.pack import Pack
from ..pack.peft_layout import config_bytes
from ..tasks import NO_TASK
from . import names

MARK = "<!-- written by adapterpack push from the manifest; remove this line to keep a text of your own -->"
"""A card with this line is written anew by a push; one without it is somebody's own and stays."""


def pack_card(pack: Pack, at: names.Reference, report: Report) -> str:
    """The README of a pack: a YAML header for the hub, how to use it, what was checked, what was measured, what it was trained with."""
    manifest = pack.manifest
    base, peft = str(manifest.base.name), config_bytes(manifest) is not None
    name = manifest.pack.name
    header = {
        **_header(base, manifest.base_license, manifest, ["adapterpack", manifest.method.type]),
        "library_name": "peft" if peft else "adapterpack",
        "pipeline_tag": None if manifest.task.type == NO_TASK else manifest.task.type,
        "model-index": _model_index(manifest),
    }
    peft_use = [
        "## PEFT, transformers", _code("python", f'''
from peft import PeftModel
model = PeftModel.from_pretrained(base_model, "{at.repo}"{f', subfolder="{at.folder}"' if at.folder else ""})'''),
        "## vLLM", _code("sh", _vllm(base, name, at)) if manifest.method.type == "lora" else
        "vLLM serves LoRA only; this adapter can be merged or exported first.",
    ] if peft else ["## Other libraries", "This adapter has no PEFT form: merge it into its base, or export it to ONNX Runtime."]
    return _page(header, [
        f"# {_text(name)}", _text(manifest.pack.description),
        f"An adapter ({manifest.method.type}) for [{base}](https://huggingface.co/{base}), packed by adapterpack.", _facts({
            "pack": pack.id, "task": manifest.task.type, "labels": ", ".join(manifest.task.labels or ()),
            "sites": sum(group.role == "adapter" for group in manifest.groups),
            "parameters": f"{sum(value.size for value in pack.tensors.values()):,}", "base content": manifest.base.content or "not known",
            "canary": "carried" if manifest.canary else "none"}),
        "## adapterpack", _code("sh", f"adapterpack pull hf://{at.address} -o {name}\nadapterpack validate {name} --base path/to/base"),
        *peft_use,
        "## ONNX Runtime", _code("sh", f"adapterpack export hf://{base} hf://{at.address} -o bundle\n"
                                       f'adapterpack run bundle --adapter {name} --prompt "..."'),
        *_audited(report, at), *_measured(manifest), *_trained(manifest),
    ])


def bundle_card(bundle: Any, at: names.Reference, base: str, license_name: str, report: Report) -> str:
    """The README of a bundle."""
    header = {"base_model": base, "base_model_relation": "quantized" if bundle.quantization else "adapter", "library_name": "adapterpack",
              "license": license_name, "pipeline_tag": bundle.task, "tags": ["adapterpack", "onnx", "onnxruntime"]}
    adapters = [{"adapter": one.name, "slot": one.slot, "labels": ", ".join(one.labels or ()), "pack": one.pack} for one in bundle.adapters]
    return _page(header, [
        f"# {_text(at.name)}",
        f"[{base}](https://huggingface.co/{base}) with adapters as one ONNX graph, mode {bundle.mode}, exported by adapterpack.",
        _table(adapters),
        "## Use", _code("sh", f"adapterpack pull hf://{at.address} -o bundle\nadapterpack validate bundle --full\nadapterpack run bundle "
                              '--prompt "..."'),
        *_audited(report, at),
    ])


def _vllm(base: str, name: str, at: names.Reference) -> str:
    """vLLM takes a whole repository by its name, and a folder in one as a folder on the disk."""
    fetch = f"hf download {at.repo} --include '{at.folder}/*' --local-dir .\n" if at.folder else ""
    return f"{fetch}vllm serve {base} --enable-lora --lora-modules {name}={at.folder or at.repo}"


def _header(base: str, base_license: str | None, manifest: m.Manifest, tags: list[str]) -> dict[str, Any]:
    link = {"license_name": manifest.license, "license_link": manifest.license_link, "license": "other"} if manifest.license_link else \
        {"license": str(manifest.license).lower()}
    return {"base_model": base, "base_model_relation": "adapter", **link, "tags": tags}


def _model_index(manifest: m.Manifest) -> list[dict[str, Any]] | None:
    if not manifest.metrics:
        return None
    results = [{"task": {"type": manifest.task.type},
                "dataset": {"name": str(metric.get("dataset") or "not named"), "type": str(metric.get("dataset") or "unknown")},
                "metrics": [{"type": str(metric.get("name")), "value": metric.get("value")}]} for metric in manifest.metrics]
    return [{"name": manifest.pack.name, "results": results}]


def _audited(report: Report, at: names.Reference) -> list[str]:
    """What the validator said before the push; the topics that it left open without their words, which may name a place on a disk."""
    left = dict.fromkeys(text.partition(":")[0] for text in report.not_checked)
    return ["## Checked before it was published", _facts({
        "files, digests, structure, values": report.state if report.valid else "not valid",
        "warnings": "; ".join(f"{finding.rule}: {finding.message}" for finding in report.findings) or "none",
        "not checked": ", ".join(left) or "nothing"}), f"`adapterpack validate hf://{at.address} --full` checks it again."]


def _measured(manifest: m.Manifest) -> list[str]:
    return ["## Measured (claimed by the author)", _table(manifest.metrics)] if manifest.metrics else []


def _trained(manifest: m.Manifest) -> list[str]:
    rows = {**manifest.config, **manifest.training}
    return ["## Training", _facts(rows)] if rows else []


def _page(header: Mapping[str, Any], parts: Iterable[str]) -> str:
    import yaml  # noqa: PLC0415 - only who pushes needs it

    told = {key: value for key, value in header.items() if value not in (None, [], "")}
    top = yaml.safe_dump(told, sort_keys=True, allow_unicode=True, width=120)
    return f"---\n{top}---\n{MARK}\n\n" + "\n\n".join(part for part in parts if part) + "\n"


def _code(language: str, text: str) -> str:
    return f"```{language}\n{text.strip()}\n```"


def _facts(values: Mapping[str, Any]) -> str:
    return _table([{"what": key.replace("_", " "), "value": value} for key, value in values.items() if value not in (None, "", [], {}, ())])


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    if not rows:
        return ""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    lines = [columns, ["---"] * len(columns), *([_text(row.get(column, "")) for column in columns] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _text(value: Any) -> str:
    """A value as Markdown that stays text: no markup, no HTML, no line of its own."""
    if isinstance(value, float):
        value = f"{value:.6g}"
    elif isinstance(value, Mapping):
        value = ", ".join(f"{key}: {item}" for key, item in value.items())
    elif isinstance(value, list | tuple):
        value = ", ".join(map(str, value))
    return re.sub(r"([\\`*\[\]<>|#])", r"\\\1", " ".join(str(value).split()))
