"""The parts of a manifest, and the types of their strings and numbers with the limits of their JSON.
``schemas/manifest.v1.json`` is generated from them, including the docstrings of the classes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal, NotRequired, TypedDict

from msgspec import Meta, field

from ..io import DTYPES, Json, Misfit, StrictStruct, escape_key, find_duplicates

NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}"
"""Pattern of valid pack names."""
PackName = Annotated[str, Meta(pattern=rf"^{NAME}\Z")]
Path = Annotated[str, Meta(min_length=1, max_length=512, pattern=r"^[^\x00-\x1f\x7f]+\Z")]
"""The name of a module, a tensor or a parameter."""
Line = Annotated[str, Meta(min_length=1, max_length=200, pattern=r"^[^\x00-\x1f\x7f]+\Z")]
ShortText = Annotated[str, Meta(max_length=200)]
Repo = Annotated[str, Meta(max_length=200, pattern=r"^[A-Za-z0-9][A-Za-z0-9._/-]*\Z")]
Commit = Annotated[str, Meta(pattern=r"^[0-9a-f]{40}\Z")]
Identifier = Annotated[str, Meta(pattern=r"^[a-z][a-z0-9_]{0,63}\Z")]
Architecture = Annotated[str, Meta(pattern=r"^[A-Za-z_][A-Za-z0-9_]{0,127}\Z")]
Hex = Annotated[str, Meta(pattern=r"^[0-9a-f]{64}\Z")]
Sha256 = Annotated[str, Meta(pattern=r"^sha256:[0-9a-f]{64}\Z")]
Fingerprint = Annotated[str, Meta(pattern=r"^bfp1:[0-9a-f]{64}\Z")]

SpecVersion = Annotated[int, Meta(ge=1, le=10_000)]
Width = Annotated[int, Meta(ge=1, le=1 << 24)]
Count = Annotated[int, Meta(ge=0, le=1 << 53)]
TokenId = Annotated[int, Meta(ge=0, le=(1 << 31) - 1)]
TokenIds = Annotated[tuple[TokenId, ...], Meta(min_length=1, max_length=512)]
Number = Annotated[float, Meta(ge=-1e38, le=1e38)]
Positive = Annotated[float, Meta(ge=0, le=1e38)]

MAX_TEXT = 1 << 20
MAX_ITEMS = 1 << 18
MAX_KEYS = 1 << 16
LARGEST_SETTING, LARGEST_CLAIM = 1e38, 1.7976931348623157e308
Key = Annotated[str, Meta(max_length=512)]
"""The name of a setting or a claim."""
OF_SETTINGS, OF_CLAIMS = (
    {"additionalProperties": {"$ref": f"#/$defs/{name}"}} for name in ("setting", "claim")
)
Settings = Annotated[Mapping[Key, Any], Meta(max_length=64, extra_json_schema=OF_SETTINGS)]
Claims = Annotated[Mapping[Key, Any], Meta(max_length=64, extra_json_schema=OF_CLAIMS)]

TokenizerDigest = Annotated[str, Meta(pattern=r"^(same-as-base|[0-9a-f]{64})\Z")]
Finite = Annotated[float, Meta(ge=-LARGEST_CLAIM, le=LARGEST_CLAIM)]


def too_large(value: Any, pointer: str, largest: float) -> Iterator[Misfit]:
    """Yields the strings, lists, objects and numbers (beyond ``largest``) that are too large in an arbitrary
    JSON value.
    """
    kind = type(value)
    if kind is str:
        if len(value) > MAX_TEXT:
            yield Misfit(pointer, f"a text of {len(value)} characters is longer than {MAX_TEXT}")
    elif kind is int or kind is float:
        if abs(value) > largest:
            yield Misfit(pointer, f"expected a number up to {largest} in size, found {value!r:.40}")
    elif kind is list:
        if len(value) > MAX_ITEMS:
            yield Misfit(pointer, f"{len(value)} items are more than {MAX_ITEMS}")
        for number, item in enumerate(value):
            yield from too_large(item, f"{pointer}/{number}", largest)
    elif kind is dict:
        if len(value) > MAX_KEYS:
            yield Misfit(pointer, f"{len(value)} fields are more than {MAX_KEYS}")
        for key, item in value.items():
            if len(key) > 512:
                yield Misfit(pointer, f"{key!r:.100} is no name that a field can have here")
            yield from too_large(item, f"{pointer}/{escape_key(key)}", largest)


class PackInfo(StrictStruct):
    """Names and claims about the pack itself; ``created`` is RFC 3339."""

    name: PackName
    version: Annotated[
        str, Meta(max_length=128, pattern=r"^[0-9]+\.[0-9]+\.[0-9]+([-+][0-9A-Za-z.+-]{1,64})?\Z")
    ] = "0.1.0"
    description: Annotated[str, Meta(max_length=4000)] = ""
    authors: Annotated[tuple[Line, ...], Meta(max_length=64)] = ()
    created: (
        Annotated[
            str,
            Meta(
                pattern=r"^[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}(Z|[+-][0-9]{2}:[0-9]{2})\Z"
            ),
        ]
        | None
    ) = None


class MethodRef(StrictStruct):
    """Which method made the tensors."""

    type: Identifier
    spec_version: SpecVersion = 1


class PackTask(StrictStruct):
    """What the adapted model does: the Hugging Face pipeline name, the model class, and the labels in
    order.
    """

    type: Annotated[str, Meta(pattern=r"^[a-z][a-z0-9-]{0,63}\Z")]
    architecture: Architecture | None = None
    labels: (
        Annotated[
            tuple[Annotated[str, Meta(min_length=1, max_length=200)], ...],
            Meta(min_length=1, max_length=10_000, extra_json_schema={"uniqueItems": True}),
        ]
        | None
    ) = None

    def breaches(self) -> Iterator[Misfit]:
        """Yields repeated labels."""
        return find_duplicates(self.labels, "/labels")


class Dims(StrictStruct):
    """The sizes of a base: width of the hidden state, number of layers and of attention heads, entries of the
    vocabulary.
    """

    hidden: Width | None = None
    layers: Annotated[int, Meta(ge=1, le=65_536)] | None = None
    heads: Annotated[int, Meta(ge=1, le=65_536)] | None = None
    vocab: Width | None = None


class Variant(StrictStruct):
    """Another form of the same base for which the pack is meant: how it differs, its digests, and whether it
    was tried.
    """

    relation: Annotated[str, Meta(pattern=r"^(dtype_cast|quantized|reshard|renamed_keys)\Z")]
    structure: Fingerprint | None = None
    content: Fingerprint | None = None
    tested: bool = False


class Base(StrictStruct):
    """The model that the pack belongs to: name, commit, architecture and sizes are hints, the digests are its
    identity.

    ``structure``, ``files``, ``content`` and ``probe`` are the four levels of the fingerprint, each may be
    unknown.
    """

    name: Repo | None = None
    commit: Commit | None = None
    model_type: Annotated[str, Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}\Z")] | None = None
    structure: Fingerprint | None = None
    content: Fingerprint | None = None
    architecture: Architecture | None = None
    dims: Dims | None = None
    files: Fingerprint | None = None
    probe: Fingerprint | None = None
    variants: Annotated[tuple[Variant, ...], Meta(max_length=64)] = ()


class Group(StrictStruct):
    """One module that the pack changes. ``role`` is ``adapter``, or ``full`` for a module that was trained
    whole; the one group of role ``shared`` is no module and holds what all adapters of the pack have in
    common. A width may be unknown (None).

    ``weight`` is the literal name of the tensor in the base checkpoint, followed by ``[START:STOP]`` where
    only these rows of it are the module's; ``config`` holds the hyper-parameters that differ here from the
    manifest's ``config``; ``scale`` is the number that multiplies the branch. A ``method`` of its own stands
    where it is not the pack's; the group's ``config`` is then the whole.
    """

    path: Path
    role: Literal["adapter", "full", "shared"] = "adapter"
    kind: Annotated[str, Meta(pattern=r"^[a-z][a-z0-9_]{0,31}\Z")] = "linear"
    weight: Annotated[str, Meta(min_length=1, max_length=512)] | None = None
    in_features: Width | None = None
    out_features: Width | None = None
    bias: bool = False
    rank: Width | None = None
    scale: Number | None = None
    config: Settings = field(default_factory=dict)
    method: MethodRef | None = None

    def breaches(self) -> Iterator[Misfit]:
        """Yields hyper-parameters beyond their bounds."""
        return too_large(self.config, "/config", LARGEST_SETTING)


class TensorEntry(StrictStruct):
    """One tensor: where it is, what it is, and the proof of its bytes. ``scales`` names the int8 tensor's
    scales.
    """

    file: Path
    dtype: Annotated[str, Meta(pattern=rf"^({'|'.join(DTYPES)})\Z")]
    shape: Annotated[tuple[Annotated[int, Meta(ge=1, le=1 << 40)], ...], Meta(max_length=8)]
    sha256: Hex
    group: Path
    param: Path
    scales: Path | None = None


class FileEntry(StrictStruct):
    """One file of a closed list."""

    path: str
    size: Annotated[int, Meta(ge=0, le=1 << 44)]
    sha256: Hex
    role: str


class PackFile(FileEntry):
    """One file of a pack."""

    path: Annotated[str, Meta(pattern=r"^[A-Za-z0-9_][A-Za-z0-9._-]{0,127}\Z")]
    role: Annotated[str, Meta(pattern=r"^(tensors|peft_config|chat_template)\Z")]


class Parent(StrictStruct):
    """A pack that this one was made from, by digest; ``repo`` and ``commit`` say where it was found."""

    digest: Sha256
    name: Path
    weight: Number | None = None
    repo: Repo | None = None
    commit: Commit | None = None


class Lineage(StrictStruct):
    """The operation that made this pack from its parents, with every parameter.

    ``tool`` is name and version; ``source_format`` what a converted pack was before; ``ancestors`` the
    parents of the parents, pack digest to pack digests, as far as they are known.
    """

    operation: Identifier
    parents: Annotated[tuple[Parent, ...], Meta(max_length=64)]
    params: Claims = field(default_factory=dict)
    tool: Annotated[str, Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9._+ -]{0,127}\Z")] | None = None
    seed: Count | None = None
    source_format: Literal["peft", "kohya", "diffusers", "gguf", "onnx_adapter", "checkpoint"] | None = None
    ancestors: Annotated[
        Mapping[
            Sha256,
            Annotated[tuple[Sha256, ...], Meta(max_length=64, extra_json_schema={"uniqueItems": True})],
        ],
        Meta(max_length=256),
    ] = field(default_factory=dict)

    def breaches(self) -> Iterator[Misfit]:
        """Yields parameters beyond their bounds, and ancestors that list a parent twice."""
        yield from too_large(self.params, "/params", LARGEST_CLAIM)
        for digest, parents in self.ancestors.items():
            yield from find_duplicates(parents, f"/ancestors/{digest}")


class PackTokenizer(StrictStruct):
    """The tokenizer in training: sha256 of ``tokenizer.json``, of ``added_tokens.json`` and of the chat
    template, as hex.

    ``same-as-base`` says that the base's own was used; None that nothing is known, or that there is none.
    """

    tokenizer_json: TokenizerDigest | None = None
    added_tokens: TokenizerDigest | None = None
    chat_template: TokenizerDigest | None = None


class BaseQuantization(StrictStruct):
    """How the base was quantized while the adapter was trained on it, for instance ``nf4`` and its
    parameters.
    """

    scheme: Annotated[str, Meta(pattern=r"^[a-z][a-z0-9_-]{0,63}\Z")]
    params: Claims = field(default_factory=dict)

    def breaches(self) -> Iterator[Misfit]:
        """Yields parameters beyond their bounds."""
        return too_large(self.params, "/params", LARGEST_CLAIM)


class Run(StrictStruct):
    """Directions of a packed matrix that follow each other in one code."""

    count: Width
    code: Annotated[str, Meta(pattern=r"^[a-z][a-z0-9]{0,15}\Z")]


class Packed(StrictStruct):
    """How the bytes of a tensor stand for a matrix of this ``shape`` (what is behind its second axis counts
    as columns).

    ``axis`` says what its directions are: 0 for its rows, 1 for its columns. ``group`` numbers of a direction
    share a scale. The bytes are the scales of all directions, then the codes of each.
    """

    shape: Annotated[tuple[Annotated[int, Meta(ge=1, le=1 << 33)], ...], Meta(min_length=2, max_length=8)]
    axis: Annotated[int, Meta(ge=0, le=1)]
    group: Annotated[int, Meta(ge=1, le=1 << 33)]
    runs: Annotated[tuple[Run, ...], Meta(min_length=1, max_length=16)]

    def breaches(self) -> Iterator[Misfit]:
        """Yields runs that do not add up to the directions, and shapes with more numbers than a layer can
        have.
        """
        if math.prod(self.shape) > 1 << 33:
            yield Misfit("/shape", "stands for more numbers than a layer has")
        directions = self.shape[0] if self.axis == 0 else math.prod(self.shape[1:])
        if sum(run.count for run in self.runs) != directions:
            yield Misfit("/runs", f"make up other than the {directions} directions that the shape has")


class Quantization(TypedDict):
    """How the tensors of the pack are stored, and the error in the change: its largest entry, and in
    proportion to the change.

    ``sites`` is the error in proportion at each site, ``packed`` how the bytes of each tensor are to be read
    that is not floats.
    """

    scheme: Annotated[str, Meta(pattern=r"^[a-z][a-z0-9_-]{0,31}\Z")]
    max_error: Positive
    relative_error: Positive
    sites: NotRequired[Annotated[Mapping[Path, Positive], Meta(max_length=50_000)]]
    packed: NotRequired[Annotated[Mapping[Path, Packed], Meta(max_length=50_000)]]


class Safety(TypedDict):
    """What a pack promises to do without; both are false in every pack."""

    contains_code: Annotated[bool, Meta(extra_json_schema={"const": False})]
    requires_remote_code: Annotated[bool, Meta(extra_json_schema={"const": False})]


class Recipe(StrictStruct):
    """Inputs by recipe: the seed of their numbers and their shape."""

    seed: Annotated[int, Meta(ge=0, le=(1 << 32) - 1)]
    shape: tuple[int, ...]


class Pixels(Recipe):
    """Images by recipe: ``(images, channels, height, width)``."""

    shape: Annotated[tuple[Annotated[int, Meta(ge=1, le=2048)], ...], Meta(min_length=4, max_length=4)]


class Features(Recipe):
    """Speech by recipe: ``(rows, bands, frames)``."""

    shape: Annotated[tuple[Annotated[int, Meta(ge=1, le=65_536)], ...], Meta(min_length=3, max_length=3)]


class CompositionMember(StrictStruct):
    """An adapter that a composed pack holds: its name there, the digest of the pack that it came from, and
    its method.
    """

    name: Annotated[str, Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]{0,63}\Z")]
    digest: Sha256
    method: Identifier
    spec_version: SpecVersion = 1


class Composition(StrictStruct):
    """How the adapters in a composed pack work together: a tree over their names (``adapter_methods/nodes``),
    as JSON values.

    ``tree`` is a member, or a node with its kind, what it is made of, and its settings; at most 6 levels and
    64 leaves.
    """

    tree: Annotated[Mapping[Key, Any], Meta(min_length=1, max_length=32, extra_json_schema=OF_SETTINGS)]
    members: Annotated[tuple[CompositionMember, ...], Meta(min_length=1, max_length=64)]

    def breaches(self) -> Iterator[Misfit]:
        """Yields settings of nodes beyond their bounds."""
        return too_large(self.tree, "/tree", LARGEST_SETTING)


class TopLogits(TypedDict):
    """The largest logits of a row and whose they are: ids of tokens or labels, or places in a hidden
    state.
    """

    ids: Annotated[list[TokenId], Meta(min_length=1, max_length=64)]
    logits: Annotated[
        list[Annotated[float, Meta(ge=-3.4028234663852886e38, le=3.4028234663852886e38)]],
        Meta(min_length=1, max_length=64),
    ]


class Canary(StrictStruct):
    """An executable proof: these inputs must give these logits, without and with the adapter.

    ``base`` and ``adapter`` hold, row by row, the logits at the last position: ``ids`` (the top ones) and
    their ``logits``; for a model without logits, components of its last hidden state, or of both embeddings
    of two towers. In ``base`` the pack's trained head is on and its adapters are off. ``input_ids`` is empty
    where ``pixels`` or ``features`` (of speech) take their place. With images, a row's one image token stands
    for all positions of its image. ``decoder_input_ids`` go into a decoder, where there is an encoder too.
    """

    input_ids: Annotated[tuple[TokenIds, ...], Meta(max_length=16)]
    base: Annotated[tuple[TopLogits, ...], Meta(max_length=16)]
    adapter: Annotated[tuple[TopLogits, ...], Meta(min_length=1, max_length=16)]
    tolerance: Annotated[float, Meta(gt=0, le=1e38)]
    dtype: Annotated[str, Meta(pattern=r"^(float32|float16|bfloat16)\Z")] = "float32"
    decoder_input_ids: Annotated[tuple[TokenIds, ...], Meta(min_length=1, max_length=16)] | None = None
    pixels: Pixels | None = None
    features: Features | None = None


class Dataset(TypedDict):
    """A data set that an adapter was trained on."""

    id: Line
    revision: ShortText | None
    digest: Sha256 | None


class LossPoint(TypedDict):
    """The mean loss of the steps up to this one, from the point before on."""

    step: Count
    loss: Finite


class TrainingClaims(TypedDict, total=False):
    """What a pack may say of its training, among other claims."""

    datasets: Annotated[list[Dataset], Meta(max_length=256)]
    objective: ShortText
    steps: Count
    seed: Count
    precision: Annotated[str, Meta(max_length=64)]
    framework_versions: Annotated[
        Mapping[Annotated[str, Meta(max_length=512)], Annotated[str, Meta(max_length=64)]],
        Meta(max_length=64),
    ]
    code_commit: Annotated[str, Meta(pattern=r"^[0-9a-f]{7,64}\Z")]
    losses: Annotated[list[LossPoint], Meta(max_length=1000)]
    evaluations: Annotated[
        list[Annotated[Mapping[Key, Finite], Meta(max_length=64)]],
        Meta(max_length=1000),
    ]


def settings_of(training: Mapping[str, Any]) -> Json:
    """Returns what a pack says about its training, without the curves, which reports plot.

    Example:
        >>> settings_of({"seed": 1, "losses": [], "evaluations": []})
        {'seed': 1}
    """
    return {name: value for name, value in training.items() if name not in ("losses", "evaluations")}


class Metric(TypedDict, total=False):
    """What a pack may say of how good it is, among other claims."""

    name: Line
    value: Finite | None
    base_value: Finite | None
    task: ShortText
    dataset: ShortText
    revision: ShortText
    n: Count
    harness: ShortText
