"""Opens a base model for a conversion: its module names and shapes, its configuration, its fingerprint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from msgspec.structs import replace

from ..adapter_methods import is_bare, is_stacked
from ..base import Checkpoint
from ..errors import Unsupported
from ..hub import folder_of
from ..manifest import manifest as m
from ..pack import Pack, is_module, match_layers, named_on, seal
from ..pack.layer_kinds import kind_of_shape, require_shape
from ..paths import StrPath
from ..tasks import TASKS, type_of


@dataclass(frozen=True)
class BaseModel:
    """A base: a transformers checkpoint, or one model of a diffusers pipeline.

    ``allow_structural`` accepts packs of a base with the same names, dtypes and shapes, whatever its weights.
    """

    checkpoint: Checkpoint
    allow_structural: bool = False

    @property
    def folder(self) -> Path:
        """The folder of the checkpoint."""
        return self.checkpoint.folder

    @property
    def config(self) -> Mapping[str, Any]:
        """The model's configuration."""
        return self.checkpoint.config

    @cached_property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Tensor names with their shapes."""
        return {name: info.shape for name, info in self.checkpoint.tensors.items()}

    @property
    def model_type(self) -> str | None:
        """The model type in its configuration, or its class for a diffusers model."""
        stated = self.config.get("model_type") or self.config.get("_class_name")
        return stated if isinstance(stated, str) else None

    def modules(self) -> dict[str, tuple[int, ...]]:
        """Returns every module with a weight, and that weight's shape."""
        return {
            name.removesuffix(".weight"): shape
            for name, shape in self.shapes.items()
            if name.endswith(".weight")
        }

    def weight_name(self, path: str, recorded: str | None = None) -> str:
        """Returns the tensor of a module's weight: the ``recorded`` one, if the base has it, else one that
        matches the path. The paths of a task model may have one prefix more or less than its checkpoint.

        Raises:
            SiteNotFound: the base has no such tensor.
        """
        return self.checkpoint.require_weight(path, recorded)

    def stored_shape(self, path: str) -> tuple[int, ...] | None:
        """Returns the shape of a parameter by its path, or of a stack that is stored matrix by matrix; None
        if there is no such parameter.
        """
        stack = next(
            (
                self.checkpoint.stacks[name]
                for name in (path, path.partition(".")[2])
                if name in self.checkpoint.stacks
            ),
            None,
        )
        name = self.checkpoint.tensor_name(path)
        return stack.shape if stack is not None else None if name is None else self.shapes[name]

    def read(self, name: str) -> np.ndarray:
        """Reads a tensor of the base."""
        return self.checkpoint.read(name)

    def module_paths(self) -> tuple[str, ...]:
        """Returns the paths of the modules of the base's model, in the model's order, without loading its
        weights.

        Raises:
            Unsupported: adapterpack cannot build the model.
        """
        # only few methods depend on the order, so only these need torch
        from ..torch_adapters.models.load import empty_model  # noqa: PLC0415

        task = TASKS.find(self.task().type)
        if task is None:
            raise Unsupported(
                "what this file means depends on the order of the base's layers, and there is no model "
                "that has it",
                where=self.folder,
                found=self.config.get("architectures"),
                expected="a base of transformers, of a known task",
                remedy="save it again with PEFT after setting save_indices=True in its config",
            )
        return tuple(path for path, _ in empty_model(self.folder, task).named_modules())

    def identity(self) -> m.Base:
        """Returns the base as a manifest names it; reads every byte once for the content digest."""
        base = self.checkpoint
        return m.Base(base.name, base.commit, self.model_type, base.structure, base.content, probe=base.probe)

    def task(self) -> m.PackTask:
        """Returns the task of the base, by its class."""
        classes = self.config.get("architectures")
        architecture = (
            classes[0] if isinstance(classes, list) and classes and isinstance(classes[0], str) else None
        )
        return m.PackTask(type_of(architecture, self.config), architecture)


def open_base(base: StrPath | BaseModel) -> BaseModel:
    """Opens the base in a folder: a transformers checkpoint, or one model of a diffusers pipeline.

    Raises:
        StorageError: there is no such folder.
        FormatError: its files are malformed.
    """
    if isinstance(base, BaseModel):
        return base
    return BaseModel(Checkpoint(folder_of(base)))


def bind_to_base(pack: Pack, base: BaseModel | None) -> Pack:
    """Returns the pack with the base's fingerprint, the names of its tensors, and which sites have a bias,
    after checking the shape of every site. Returns the pack unchanged if ``base`` is None.

    Raises:
        BaseMismatch: the pack names another base, or a site has another shape.
        SiteNotFound: the base lacks a site.
    """
    if base is None:
        return pack
    pack.require_base(base.checkpoint, allow_structural=base.allow_structural)
    pack = match_layers(named_on(pack, base.checkpoint), base.checkpoint)
    groups = []
    for group in pack.groups:
        if group.role != "adapter" or not is_module(group.path) or pack.method_of(group).kind != "weight":
            groups.append(group)
            continue
        stack = base.stored_shape(group.path) if is_stacked(group.kind) else None
        # the files store the stack's matrices one by one
        if stack is not None and group.path not in base.shapes:
            require_shape(pack, group, stack, base.folder)
            groups.append(group)
            continue
        weight = base.weight_name(group.path, group.weight)
        here = replace(group, kind=kind_of_shape(base.shapes[weight], pack, group))
        require_shape(pack, here, base.shapes[weight], base.folder)
        bias = not is_bare(here.kind) and f"{weight.removesuffix('weight')}bias" in base.shapes
        groups.append(replace(here, weight=weight, bias=bias))
    if pack.manifest.base.content is not None:
        return pack
    draft = replace(pack.manifest, base=base.identity(), groups=tuple(groups), files=())
    return seal(draft, pack.tensors)
