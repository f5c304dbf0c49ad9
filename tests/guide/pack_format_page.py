"""The specification of the pack format, read off the schema and the upgrade steps:
``python tests/guide/pack_format_page.py > docs/pack-format.md``.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from adapterpack.manifest.manifest import FEATURES, FORMAT_VERSION, MAX_BYTES
from adapterpack.manifest.migrations import STEPS

sys.path.insert(0, str(Path(__file__).parents[1]))
from format_schemas import part_at

SCHEMA = Path(__file__).parents[2] / "schemas" / "manifest.v1.json"
INTRO = f"""# The pack format

Version {FORMAT_VERSION}. [`schemas/manifest.v1.json`](../schemas/manifest.v1.json) is the normative description; `make guide` generates
this page from it.

A pack is a folder:

| file | what it is |
|---|---|
| `adapterpack.json` | the manifest: UTF-8 JSON in canonical form, at most {MAX_BYTES >> 20} MiB |
| `adapter_model.safetensors` | the tensors, with PEFT's names where PEFT has the method |
| `adapter_config.json` | PEFT's configuration, derived from the manifest and checked against it; absent where PEFT lacks the method |
| `chat_template.jinja` | optional; the chat template that the adapter was trained with |
| `adapterpack.sig.json` | optional; a signature, which is not listed in the manifest |
| `README.md`, `.gitattributes` | optional; not listed, and never read |

Nothing else may lie in the folder. Links, pickles and other executable formats are refused.

**Identity.** The canonical form has sorted keys, two spaces of indentation and one line feed at the end. The id of a pack is the sha256 of
its manifest's bytes; the manifest holds the sha256 of every file and every tensor, and from 1.4 on of itself with that digest left empty.
The same content written twice gives the same bytes.

## Change policy

- The version is `major.minor`. **A minor version only adds fields.** A reader of this version reads every older minor version through
  numbered upgrade steps in memory; the bytes on disk, and with them the id and the signature, stay as they are. Packs of every version
  since 1.0 are kept in the test suite and must stay readable.
- A **newer** minor version is read as far as it is known: unknown fields are ignored, unless `must_understand` names a feature that this
  reader lacks; then the pack is refused.
- A new **major** version is refused with a named error.
- Fields under `extensions`, named `x_...`, belong to others. They are kept, and never interpreted but for `x_text_profile`, by which a server chooses
  for the model [`auto`](serve.md#the-model-auto).
- `training`, `metrics`, licenses and the texts of `pack` are claims of the author. Everything else is checked
  ([the validator](validator.md), rule by rule).

Features that this version understands in `must_understand`: {", ".join(f"`{feature}`" for feature in sorted(FEATURES))}.

| version | change |
|---|---|
| 1.0 | the first |
"""


def page() -> str:
    """The policy, the history, and every field with its type and limits."""
    schema = json.loads(SCHEMA.read_text("utf-8"))
    history = "".join(f"| {step.to} | adds {step.adds} |\n" for step in STEPS.values())
    since: dict[str, dict[str, str]] = {}
    for step in STEPS.values():
        for place, fields in step.fields.items():
            since.setdefault(part_at(schema, place).get("title", ""), {}).update(
                dict.fromkeys(fields, f"from {step.to} on")
            )
    parts = [
        INTRO + history,
        f"## The manifest\n\n{schema['description']}\n\n{_fields(schema, since[schema['title']])}",
    ]
    for name, part in schema["$defs"].items():
        about = part.get("description", "").replace("``", "`").strip()
        parts.append(f"### {name} {{ #{name.lower()} }}\n\n{about}\n\n{_fields(part, since.get(name, {}))}")
    return "\n".join(part.rstrip() + "\n" for part in parts)


def _fields(part: dict[str, Any], since: dict[str, str]) -> str:
    required = {**dict.fromkeys(part.get("required", ()), "yes"), **since}
    rows = [
        f"| `{name}` | {_type(kind)} | {required.get(name, '-')} |\n"
        for name, kind in part.get("properties", {}).items()
    ]
    return "| field | type and limits | required |\n|---|---|---|\n" + "".join(rows) if rows else ""


def _type(kind: dict[str, Any]) -> str:
    """A schema in words."""
    if "$ref" in kind:
        name = kind["$ref"].rpartition("/")[2]
        return f"[{name}](#{name.lower()})"
    if "anyOf" in kind:
        return " or ".join(_type(each) for each in kind["anyOf"])
    for key in ("const", "enum"):
        if key in kind:
            values = [kind[key]] if key == "const" else kind[key]
            return " or ".join(f"`{json.dumps(value)}`" for value in values)
    about = kind.get("type")
    if about == "array":
        return (
            "list of "
            f"{_type(kind.get('items', {})) or 'values'}{_bounds(kind, 'minItems', 'maxItems', ' entries')}"
        )
    if about == "object":
        values = kind.get("additionalProperties")
        held = f" of {_type(values)}" if isinstance(values, dict) else ""
        return f"object{held}{_bounds(kind, 'minProperties', 'maxProperties', ' entries')}"
    text = " or ".join(about) if isinstance(about, list) else str(about or "")
    pattern = f", `{kind['pattern']}`".replace("|", "\\|") if "pattern" in kind else ""
    return (
        text
        + _bounds(kind, "minLength", "maxLength", " characters")
        + _bounds(kind, "minimum", "maximum", "")
        + pattern
    )


def _bounds(kind: dict[str, Any], low: str, high: str, unit: str) -> str:
    least, most = kind.get(low), kind.get(high)
    if least is None and most is None:
        return ""
    ends = (
        f"{least} to {most}"
        if least is not None and most is not None
        else f"at most {most}"
        if least is None
        else f"at least {least}"
    )
    return f", {ends}{unit}"


if __name__ == "__main__":
    sys.stdout.write(page())
