"""Wraps modules that adapters train in full, such as a new head, to hold a copy for each adapter next to the
original, and writes the labels of the active head into the model's config, where pipelines look for them.
"""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ...adapter_methods import Site, Tensors
from ...errors import SiteNotFound, Unsupported, require_among
from ...pack import Pack
from ...tasks.data import MARKED, number_labels
from .calls import Args, Kwargs
from .tensors import as_tensor
from .weights import require_floats, require_in_memory
from .wrapper import Wrapper, bare, child, key_of


class HeadLabels(NamedTuple):
    """The meaning of a head's outputs: the names of its logits, and the problem type that they are for."""

    names: tuple[str, ...]
    problem: str

    @classmethod
    def of(cls, pack: Pack) -> HeadLabels | None:
        """Returns the labels of a pack's head, or None if it has none."""
        labels = pack.manifest.task.labels
        return None if labels is None else cls(labels, pack.manifest.problem)


class SavedModule(Wrapper):
    """A module with trained copies, named by adapter; with none active it behaves as the original.

    A copy has everything that the module's state dict has: parameters, and buffers such as the running
    statistics of a BatchNorm. ``_labels`` holds the meaning of each copy's outputs.
    """

    _copies: nn.ModuleDict = child("copies")

    def __init__(self, base: nn.Module, path: str) -> None:
        super().__init__(base, Site(path, 0, 0))
        self._modules["copies"] = nn.ModuleDict()
        self._labels: dict[str, HeadLabels | None] = {}

    @property
    def _names(self) -> tuple[str, ...]:
        """The names of the copies, in the order in which they were added."""
        return tuple(self._labels)

    def _add(self, name: str, params: Tensors | None = None, labels: HeadLabels | None = None) -> None:
        """Adds a trainable float32 copy; ``params`` replaces its tensors, also by tensors of other shapes (a
        head with other labels).
        """
        require_in_memory(self._base, self._site.path)
        require_floats(self._base, self._site.path)
        # Train in float32 whatever the base's precision: small updates would vanish in half precision.
        twin = bare(copy.deepcopy(self._base)).float().requires_grad_(True)
        tensors = twin.state_dict()
        for key, value in (params or {}).items():
            what = "the module has no such parameter"
            require_among(what, key, tensors, SiteNotFound, self._site.path, found=key)
            owner, _, leaf = key.rpartition(".")
            holder = twin.get_submodule(owner)
            tensor = as_tensor(value, tensors[key].device)
            setattr(holder, leaf, nn.Parameter(tensor) if leaf in holder._parameters else tensor)
            if isinstance(holder, nn.Linear):
                holder.out_features, holder.in_features = holder.weight.shape
        self._copies[key_of(name)] = twin
        self._labels[name] = labels

    def _part(self, name: str) -> nn.Module:
        """Returns the copy ``name``."""
        return self._copies[key_of(name)]

    def _trainable(self, name: str, yes: bool = True) -> None:
        """Makes the copy's parameters require gradients, or stop requiring them."""
        self._part(name).requires_grad_(yes)

    def _remove(self, name: str) -> None:
        """Removes a copy; unknown names are ignored."""
        if name in self._labels:
            del self._copies[key_of(name)], self._labels[name]
            self._active = tuple(active for active in self._active if active != name)

    def _run_active(self, args: Args, kwargs: Kwargs) -> Any:
        """Returns the output of the last active copy, in the original's precision."""
        if self._rows is None:
            return self._run_copy(self._active[-1], args, kwargs)
        x, base = self._enter(args, kwargs)
        y = base(x)
        for name in self._active:
            index = self._rows.index(name, x, self._site)
            if not len(index):
                continue
            own = self._run_copy(name, (x[index],), {})
            if len(args) + len(kwargs) > 1 or not isinstance(y, Tensor) or y.shape[1:] != own.shape[1:]:
                raise Unsupported(
                    "a module that was trained whole gives other outputs than the base, and one batch "
                    "cannot hold both",
                    where=self._site.path,
                    found=f"'{name}'",
                    remedy="use one adapter for all rows",
                )
            y = y.index_copy(0, index, own.to(y.dtype))
        return y

    def _same_for_all_rows(self, name: str) -> str:
        """Returns an empty string: whether the outputs of several copies fit into one batch shows only when
        they exist.
        """
        return ""

    def _run_copy(self, name: str, args: Args, kwargs: Kwargs) -> Any:
        """Returns the output of a copy, in the original's precision."""
        twin = self._copies[key_of(name)]
        output = twin(*map(_wide, args), **{key: _wide(value) for key, value in kwargs.items()})
        x, _ = self._enter(args, kwargs)
        if torch.is_autocast_enabled(x.device.type) or not isinstance(output, Tensor):
            return output
        first_parameter = next(self._base.parameters(), x)
        # An embedding's input is integer ids, so its output takes the dtype of the original's parameters.
        return output.to(x.dtype if x.is_floating_point() else first_parameter.dtype)


def _wide(value: Any) -> Any:
    """Returns a float tensor as float32, the precision of the copies; other values unchanged."""
    return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value


_KEPT = "_own_outputs"
"""The attribute of a model that keeps the labels and problem of its config while an adapter's replace
them.
"""


def saved_modules(model: nn.Module, name: str | None = None) -> list[SavedModule]:
    """Returns the modules of a model that hold trained copies, or those that hold the copy ``name``."""
    return [
        module
        for module in model.modules()
        if isinstance(module, SavedModule) and (name is None or name in module._names)
    ]


def labels_of(model: nn.Module, name: str) -> HeadLabels | None:
    """Returns the labels that came with an attached adapter's head, or None."""
    labels = (head._labels.get(name) for head in saved_modules(model))
    return next((one for one in labels if one is not None), None)


def own_outputs(model: Any) -> tuple[dict[int, str], str | None]:
    """Returns the labels and the problem type of the model itself, whichever adapter is active."""
    config = model.config
    own: tuple[dict[int, str], str | None] = model.__dict__.get(_KEPT) or (
        # PVT's class has a count of its own, and no names
        config.id2label or dict(enumerate(number_labels(config.num_labels or 0))),
        getattr(config, "problem_type", None),
    )
    return own


def keep_outputs(model: Any) -> None:
    """Makes the labels that are now in the config the model's own, after an adapter's head has become the
    model's.
    """
    model.__dict__.pop(_KEPT, None)


def name_outputs(model: Any) -> None:
    """Writes the labels of the last active head that has labels into the model's config; without one,
    restores the model's own.
    """
    if not hasattr(getattr(model, "config", None), "id2label"):
        return
    heads = saved_modules(model)
    active = [
        labels for head in heads for name in head._active[-1:] if (labels := head._labels[name]) is not None
    ]
    if not active and _KEPT not in model.__dict__:
        return
    own = own_outputs(model)
    if active:
        model.__dict__[_KEPT] = own
        names = dict(enumerate(active[0].names))
        problem = active[0].problem if active[0].problem in MARKED else None
    else:
        names, problem = own
        del model.__dict__[_KEPT]
    # Reset first: the config rejects some combinations of problem type and number of labels.
    model.config.problem_type = None
    model.config.id2label = dict(names)
    model.config.label2id = {label: number for number, label in names.items()}
    model.config.problem_type = problem
    # transformers reshapes logits by this attribute to compute a loss.
    if hasattr(model, "num_labels"):
        model.num_labels = len(names)
