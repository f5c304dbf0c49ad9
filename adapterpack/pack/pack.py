"""Defines :class:`Pack`, a manifest with its tensors in memory: the handle that every stage takes and
returns.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from msgspec.structs import replace

from ..adapter_methods import PROMPT, Arrays, Method, Site, Tensors, resolve_configs
from ..adapter_methods.core.shapes import check_shapes
from ..base import Fingerprint, Verdict, compatibility
from ..errors import ConfigError, FormatError, NothingToDo, StorageError
from ..io import TENSORS, Json, SafetensorsFile, Streamed, Unread, output_folder
from ..manifest import (
    Described,
    MethodSites,
    Sites,
    digest_tensors,
    entry_of,
    features,
    file_entry,
    require_combinable,
    write_files,
)
from ..manifest import manifest as m
from ..notebook import Shown
from ..paths import StrPath
from ..peft import layout, names
from .expansion_limit import require_limit
from .files import METADATA, contents
from .layer_kinds import require_shapes
from .quantized_tensors import decode, scale_codes
from .shared_factors import SharedFactors

if TYPE_CHECKING:
    from ..base import Checkpoint

SIGNATURE = "adapterpack.sig.json"
MUTABLE = frozenset({"README.md", ".gitattributes", SIGNATURE})
"""Files that a hub edits, and the detached signature. They are allowed in addition to the closed file list,
and never read as data.
"""
TEMPLATE = "chat_template.jinja"
FILE_ROLES = {TENSORS: "tensors", layout.CONFIG: "peft_config", TEMPLATE: "chat_template"}
"""The files that a pack may hold besides its manifest -> their role in the manifest."""
SHARED = "@shared"
"""The path of the group that holds what all sites share; no module can have this path."""


class Adapter(NamedTuple):
    """One adapted site of a pack, ready to be passed to the functions of its method."""

    site: Site
    config: Any
    params: Tensors
    weight: str | None
    method: Method

    @property
    def wide(self) -> Arrays:
        """The parameters in at least float32, because in half precision the method's own scaling would round;
        integers stay as they are.
        """
        return {
            name: value
            if value.dtype == np.float64 or np.issubdtype(value.dtype, np.integer)
            else value.astype(np.float32, copy=False)
            for name, value in self.params.items()
        }


@dataclass(frozen=True)
class Pack(Described, Shown):
    """One adapter: a manifest and its tensors. ``path`` is where it was read from, or None.

    ``extra`` holds the bytes of the other files that it carries, by name: a chat template. The following
    fields are never written and do not change the pack's id. ``alias`` is the name of the pack here, if it
    differs from its own. ``kinds`` maps paths to the kinds of layers that the available base stores
    differently from what the manifest says (:func:`~.layer_kinds.match_layers`). ``factored`` maps paths to
    changes stored in bases that other packs share. ``vouched`` verifies, with a key, the signature of the
    fleet that the pack was taken from, because a member of a fleet has no signature of its own.

    Example:
        >>> from adapterpack import load  # doctest: +SKIP
        >>> pack = load("packs/tickets")  # doctest: +SKIP
        >>> pack.name, pack.method.name  # doctest: +SKIP
        ('tickets', 'lora')
    """

    tensors: Tensors
    path: Path | None = None
    extra: Mapping[str, bytes] = dataclasses.field(default_factory=dict)
    factored: Mapping[str, SharedFactors] = dataclasses.field(default_factory=dict, repr=False)
    vouched: Callable[[Any], object] | None = dataclasses.field(default=None, repr=False, compare=False)

    def __repr__(self) -> str:
        """Returns one line, because a notebook prints the last value of a cell."""
        numbers = sum(math.prod(self.manifest.shape_of(name)) for name in self.manifest.tensors)
        place = "in memory" if self.path is None else self.path
        return (
            f"<Pack {self.name}: {self.manifest.method.type}, {len(self.manifest.groups)} modules, "
            f"{numbers:,} numbers, {place}>"
        )

    @property
    def id(self) -> str:
        """The digest of the manifest, which identifies the pack."""
        return self.manifest.id

    def called(self, name: str) -> Pack:
        """Returns the same pack under another name here, with the same manifest, digest and files.

        Raises:
            ConfigError: the name is not a valid pack name.
        """
        if not m.NAME.fullmatch(name):
            raise ConfigError(
                "a pack cannot be called that",
                expected="letters, digits and . _ -, at most 128",
                found=repr(name),
            )
        pack = copy.copy(self)
        pack.__dict__["alias"] = name
        return pack

    def renamed(self, name: str) -> Pack:
        """Returns another pack that differs only in its own name, and therefore in its id, because the
        manifest contains the name.
        """
        info = replace(self.manifest.pack, name=name)
        return dataclasses.replace(self, manifest=replace(self.manifest, pack=info), alias=None)

    @cached_property
    def _by_group(self) -> dict[str, list[tuple[str, m.TensorEntry]]]:
        groups: dict[str, list[tuple[str, m.TensorEntry]]] = {}
        for name, entry in self.manifest.tensors.items():
            groups.setdefault(entry.group, []).append((name, entry))
        return groups

    def params(self, path: str) -> Arrays:
        """Returns the tensors of one group by parameter name; tensors stored as codes are decoded to float32.

        Raises:
            FormatError, NonFinite: codes and scales give values that are not finite.
        """
        params = {}
        for name, entry in self._by_group.get(path, ()):
            if not entry.param.endswith(".scales"):
                value = self.tensors[name]
                packed = self.manifest.packed.get(name)
                where = f"pack '{self.name}', {name}"
                if packed is not None:
                    value = decode(value, packed, where)
                params[entry.param] = (
                    value if entry.scales is None else scale_codes(value, self.tensors[entry.scales], where)
                )
        group = self._adapted.get(path)
        return (
            params
            if group is None
            else names.from_peft_shapes(
                self.method_of(group), group.kind, partial(self.config_at, group), params
            )
        )

    @cached_property
    def _adapted(self) -> dict[str, m.Group]:
        return {group.path: group for group in self.groups if group.role == "adapter"}

    def site(self, group: m.Group) -> Site:
        """Returns the site that a group describes, with the details that only the shapes of its tensors
        show.
        """
        shapes = {
            entry.param: self.manifest.shape_of(name)
            for name, entry in self._by_group.get(group.path, ())
            if not entry.param.endswith(".scales")
        }
        return site_of(
            group, names.kernel_of(group.kind, shapes.values()), names.stack_of(group.kind, shapes)
        )

    def adapters(self, shape_of: Callable[[m.Group], tuple[int, ...]] | None = None) -> Iterator[Adapter]:
        """Yields every adapted site with its resolved config and parameters, including the shared ones, in
        the manifest's order.

        ``shape_of`` returns the shape ``[out, in]`` of a group's weight in the base as a method sees it,
        followed by the kernel of a convolution; it supplies what the pack itself leaves open.

        Raises:
            FormatError: a tensor does not fit the base (with ``shape_of``), or the method would compute far
                more numbers than the pack stores.
        """
        shared = self.shared()
        groups = [group for group in self.groups if group.role == "adapter"]
        sites = [self.site(group) for group in groups]
        configs = [self.config_at(group) for group in groups]
        if shape_of is not None:
            # With the base's widths known, values that depend on all sites can be resolved, method by method.
            shapes = [shape_of(group) for group in groups]
            sites = [
                dataclasses.replace(
                    site, out_features=shape[0], in_features=shape[1], kernel=shape[2:] or site.kernel
                )
                for site, shape in zip(sites, shapes, strict=True)
            ]
            for method in self.methods:
                numbers = [
                    number for number, group in enumerate(groups) if self.method_of(group).name == method.name
                ]
                resolved = resolve_configs(
                    method, [configs[number] for number in numbers], [sites[number] for number in numbers]
                )
                for number, cfg in zip(numbers, resolved, strict=True):
                    configs[number] = cfg
        require_limit(
            zip(map(self.method_of, groups), configs, sites, strict=True),
            self.manifest.tensors,
            self.where,
        )
        for group, site, cfg in zip(groups, sites, configs, strict=True):
            params = self._params_at(group.path)
            method = self.method_of(group)
            if shape_of is not None:
                check_shapes(method, cfg, site, params, self.where)
            yield Adapter(
                site,
                cfg,
                {**shared, **params} if shared and group.method is None else params,
                group.weight,
                method,
            )

    def _params_at(self, path: str) -> Tensors:
        """Returns the parameters of a site; for a pack that is too large for memory they are read on
        access.
        """
        if not isinstance(self.tensors, Streamed):
            return self.params(path)
        return Unread(
            tuple(entry.param for _, entry in self._by_group.get(path, ())), partial(self.params, path)
        )

    def shared(self) -> Arrays:
        """Returns the parameters that all sites of the pack's own method share."""
        return self.params(SHARED)

    def full(self) -> dict[str, Arrays]:
        """Returns the modules that were trained in full: path -> parameter name -> array."""
        return {group.path: self.params(group.path) for group in self.manifest.full_groups}

    def unloaded(self) -> Pack:
        """Returns this pack with its tensors on disk: each is read on access and compared with its digest.

        A pack without a folder in this package's format is returned unchanged.

        Raises:
            FormatError: the folder's tensor file can no longer be read.
        """
        if self.path is None or isinstance(self.tensors, Streamed) or not self.is_on_disk:
            return self
        file = SafetensorsFile(self.path / TENSORS)
        digests = {name: entry.sha256 for name, entry in self.manifest.tensors.items()}
        return dataclasses.replace(self, tensors=Streamed(file.path, file.tensors, digests, {}))

    @property
    def is_on_disk(self) -> bool:
        """Whether it lies in a folder in this package's format, from which tensors can be read again."""
        return self.path is not None and (self.path / m.FILE_NAME).is_file()

    def kept_open(self) -> Pack:
        """Does what :meth:`unloaded` does, for a folder that may be removed or replaced while the pack is in
        use: its file stays open.

        The tensors stay in memory if the folder changed since they were read, or if the process can open no
        more files.
        """
        try:
            pack = self.unloaded()
            return (
                pack if isinstance(pack.tensors, Streamed) and pack.tensors.keep_open(self.tensors) else self
            )
        except (FormatError, StorageError):
            return self

    def write(self, out: StrPath, replace: bool = False) -> Pack:
        """Writes the pack to a new folder ``out``, completely or not at all, and returns it with its path.
        With ``replace`` it takes the place of a pack that is there.

        Raises:
            FormatError: the manifest violates its own schema, for instance by the pack's name, so that the
                pack could not be loaded.
            OutputExists: ``out`` already exists.
            StorageError: the file system refuses.
        """
        with output_folder(out, replace) as folder:
            self.write_into(folder)
        return dataclasses.replace(self, path=Path(out))

    def write_into(self, folder: Path) -> None:
        """Writes the pack's files into an existing empty folder; the caller publishes it."""
        manifest = self.manifest.to_bytes()
        m.parse(manifest, self.where)
        write_files(folder, contents(self.manifest, self.tensors, self.extra))
        (folder / m.FILE_NAME).write_bytes(manifest)

    def require_base(
        self, base: Checkpoint, content: bool | None = True, allow_structural: bool = False
    ) -> Verdict:
        """Checks that ``base`` is the model that this pack was made for, and returns the verdict.

        ``content=False`` compares headers and samples only, None also compares bytes if these do not decide.
        A pack without digests (imported from PEFT) is checked site by site. ``allow_structural`` also accepts
        a base with equal names, dtypes and shapes but other weights.

        Raises:
            BaseMismatch: ``base`` is another model, or nothing shows that it is the right one; the error
                names both.
            SiteNotFound: the base lacks a site, or is a variant in which the module's path does not lead to
                its tensor.
        """
        fingerprint = compatibility.deciding_fingerprint(base, self.manifest.base, content)
        verdict = self.require_levels(
            fingerprint,
            name=base.name,
            where=base.where,
            model_type=base.config.get("model_type"),
            allow_structural=allow_structural,
        )
        relation = None if verdict.variant is None else verdict.variant.relation
        if relation != "quantized":  # a quantized checkpoint has other shapes and often other names
            require_shapes(self, base, renamed=relation == "renamed_keys")
        return verdict

    def require_levels(
        self,
        found: Fingerprint,
        *,
        name: str | None,
        where: object,
        model_type: str | None = None,
        allow_structural: bool = False,
    ) -> Verdict:
        """Does what :meth:`require_base` does for a base of which only the fingerprint is known
        (:func:`~adapterpack.base.compatibility.require`).

        Raises:
            BaseMismatch: the fingerprint is another model's, or nothing shows that it is the right one; the
                error names both.
        """
        return compatibility.require(
            self.where,
            self.outline.base,
            found,
            name=name,
            where=where,
            model_type=model_type,
            allow_structural=allow_structural,
        )


def is_module(path: str) -> bool:
    """Whether a group's path names a module, and not the shared parameters or the model as a unit.

    Example:
        >>> is_module("layers.0.q_proj"), is_module(SHARED)
        (True, False)
    """
    return path not in {SHARED, PROMPT}


def site_of(group: m.Group, kernel: tuple[int, ...] = (), stack: int = 1) -> Site:
    """Returns the site that a manifest group describes, with the kernel and the stack size, which the group
    does not contain.
    """
    return Site(
        group.path, group.in_features or 0, group.out_features or 0, group.kind, group.bias, kernel, stack
    )


def build(
    name: str,
    method: Method,
    adapters: Sites,
    *,
    task: m.PackTask,
    base: m.Base,
    secondary: Sequence[MethodSites] = (),
    shared: Tensors | None = None,
    full: Mapping[str, Tensors] | None = None,
    weights: Mapping[str, str | None] | None = None,
    problem: str | None = None,
    **rest: Any,
) -> Pack:
    """Builds a pack from its parts: ``adapters`` maps each site to its resolved config and parameters;
    ``full`` holds the modules trained in full.

    ``secondary`` holds the sites of other methods in the same pack; ``shared`` the parameters that all sites
    of ``method`` share. ``weights`` maps paths to the names of tensors in the base, and ``problem`` says what
    a head's logits mean; ``rest`` is passed to :class:`~.manifest.manifest.Manifest`.

    Raises:
        FormatError: the method would compute far more numbers than it stores, so that no reader would accept
            the pack.
        NonFinite: a tensor contains NaN or infinity.
        NothingToDo: there is neither an adapter nor a module trained in full.
    """
    if not adapters and not full:
        raise NothingToDo(
            "a pack needs at least one adapter or one module that was trained whole", where=f"pack '{name}'"
        )
    configs = resolve_configs(method, [cfg for cfg, _ in adapters.values()], list(adapters))
    common, differing = _shared_config(configs)
    groups = []
    adapted = []
    tensors = {}
    places = {}

    def add(path: str, param: str, tensor_name: str, value: np.ndarray) -> None:
        tensors[tensor_name] = value
        places[tensor_name] = path, param

    def adapt(
        method: Method,
        site: Site,
        cfg: Any,
        params: Tensors,
        config: Json,
        host: Method | None,
    ) -> None:
        adapted.append((method, cfg, site))
        method_ref = None if host is None else m.MethodRef(method.name, method.config.spec_version)
        groups.append(
            m.Group(
                site.path,
                "adapter",
                site.kind,
                (weights or {}).get(site.path),
                site.in_features or None,
                site.out_features or None,
                site.bias,
                cfg.rank,
                cfg.scale,
                config,
                method_ref,
            )
        )
        for param, value in names.to_peft_shapes(method, cfg, site, params).items():
            add(site.path, param, names.tensor_name(method, site.path, param, site.kind, host), value)

    for site, cfg, (_, params), overrides in zip(
        adapters, configs, adapters.values(), differing, strict=True
    ):
        adapt(method, site, cfg, params, overrides, None)
    for guest in secondary:
        require_combinable(name, MethodSites(method, adapters), guest, {group.path for group in groups})
        configs = resolve_configs(
            guest.method, [cfg for cfg, _ in guest.adapters.values()], list(guest.adapters)
        )
        for (site, (_, params)), cfg in zip(guest.adapters.items(), configs, strict=True):
            adapt(guest.method, site, cfg, params, _shared_config([cfg])[0], method)
    if shared:
        groups.append(m.Group(SHARED, "shared", "module"))
    for param, value in (shared or {}).items():
        add(SHARED, param, names.shared_name(method, param), value)
    for path, params in (full or {}).items():
        groups.append(m.Group(path, "full", "module", (weights or {}).get(path)))
        for param, value in params.items():
            add(path, param, names.full_name(method, path, param), value)
    digests, file = digest_tensors(tensors, METADATA)
    described = {key: entry_of(tensors[key], *places[key], digest=digests[key]) for key in sorted(tensors)}
    # Checked when writing, too: no reader would accept a pack beyond the limit.
    require_limit(adapted, described, f"pack '{name}'")
    draft = m.Manifest(
        pack=m.PackInfo(name),
        method=m.MethodRef(method.name, method.config.spec_version),
        config=common,
        task=task,
        base=base,
        groups=tuple(groups),
        tensors=described,
        files=(),
        must_understand=features(method, groups, problem),
        composition=method.config.composition,
        **rest,
    )
    return seal(draft, tensors, tensor_file=file)


def seal(
    draft: m.Manifest,
    tensors: Tensors,
    extra: Mapping[str, bytes] | None = None,
    tensor_file: m.PackFile | None = None,
) -> Pack:
    """Returns the pack, with the closed file list computed from the draft, its tensors and its other files.
    ``tensor_file`` is the entry of the tensor file, if already known.
    """
    files = {
        name: file_entry(name, parts, FILE_ROLES[name])
        for name, parts in contents(draft, tensors, extra or {}).items()
        if tensor_file is None or name != TENSORS
    }
    if tensor_file is not None:
        files[TENSORS] = tensor_file
    return Pack(
        replace(draft, files=tuple(files[name] for name in sorted(files))), tensors, extra=dict(extra or {})
    )


def _shared_config(configs: list[Any]) -> tuple[Json, list[Json]]:
    """Returns the settings that all sites share, and for each site the settings that differ; settings only
    for training are dropped.
    """
    fields = dataclasses.fields(configs[0]) if configs else ()
    packed = {f.name for f in fields if f.metadata.get("packed", True)}
    packed -= {
        f.name
        for f in fields
        if f.metadata.get("optional") and all(getattr(cfg, f.name) == f.default for cfg in configs)
    }
    distinct = {
        key: {k: v for k, v in dataclasses.asdict(cfg).items() if k in packed and v != {}}
        # computed once per config object, because most packs have only one
        for key, cfg in {id(cfg): cfg for cfg in configs}.items()
    }
    plain = [distinct[id(cfg)] for cfg in configs]
    common = plain[0] if plain else {}
    return common, [{k: v for k, v in config.items() if common.get(k) != v} for config in plain]
