"""How a method is stored in a folder that PEFT loads: its names, its config, and the kinds of layers that PEFT has it for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from .site import Params, Site


class PeftContent(NamedTuple):
    """What a folder that PEFT wrote holds: the config (for all sites), the tensors that all sites share, and site path -> its tensors.

    ``packed``: it is the folder of a pack, whose manifest says what these files leave open; they are taken as they are. ``written`` is
    PEFT's own configuration.
    """

    config: Any
    shared: Mapping[str, np.ndarray]
    sites: Mapping[str, Mapping[str, np.ndarray]]
    packed: bool = False
    written: Mapping[str, Any] = {}


class PeftLayer(NamedTuple):
    """How PEFT stores a method's parameters at a kind of site other than a linear layer.

    ``suffixes`` are as in :class:`PeftForm`, and the method's own if it is None; ``config`` holds the keys of PEFT's config that say that
    there are such sites. Tensors of more than two axes may say it themselves: ``axes`` are then the numbers of axes that they have. Where
    nothing says it a file of PEFT's is read as that of a linear layer. ``stored`` turns a site's parameters into PEFT's shapes; what comes
    back is the same with all axes after the first as one, and those of ``vectors`` as vectors.
    """

    suffixes: Mapping[str, str] | None = None
    config: Mapping[str, Any] = {}
    axes: tuple[int, ...] = ()
    stored: Callable[[Site, Params], dict[str, np.ndarray]] | None = None
    vectors: frozenset[str] = frozenset()

    def is_of(self, config: Mapping[str, Any], axes: set[int]) -> bool:
        """Whether PEFT's config, or the numbers of axes that the matrices of a site have, say that it is of this kind."""
        if self.suffixes is None and not self.config and not self.axes:
            return False
        return (not self.axes or axes <= set(self.axes)) and all(config.get(key) == value for key, value in self.config.items())


TRANSPOSED: Mapping[str, PeftLayer] = {"transposed": PeftLayer(config={"fan_in_fan_out": True})}
"""For a method that PEFT also has for transposed linear layers, with the same tensors."""


class PeftSecondary(NamedTuple):
    """How PEFT stores a method's tensors in a folder of another method, as trainable tokens in a folder of LoRA.

    ``hosts`` are the types of PEFT whose config has the ``key`` for it; ``suffixes`` are as in :class:`PeftForm`. ``to_config`` makes the
    key's value of site path -> config, ``from_config`` the config at a path of the key's value.
    """

    hosts: tuple[str, ...]
    key: str
    suffixes: Mapping[str, str]
    to_config: Callable[[Mapping[str, Any]], Any]
    from_config: Callable[[Any, str], Any]


Factorise = Callable[[np.ndarray], tuple[np.ndarray, ...]]
"""A float32 weight [out, in] -> U, S and V^T, in the signs of another library."""
Completed: TypeAlias = "Callable[[Any, Mapping[str, np.ndarray], Site, Factorise], tuple[Any, dict[str, np.ndarray]]]"
"""A site's config and own parameters, the site with its weight, how PEFT decomposes it -> the config and parameters that replace them."""


class PeftForm(NamedTuple):
    """How a method is stored in a folder that PEFT loads."""

    peft_type: str
    suffixes: Mapping[str, str]
    """parameter name -> what follows the module path in PEFT's tensor name."""
    to_config: Callable[[Mapping[str, Any]], dict[str, Any] | None]
    """site path -> config at that site, to PEFT's own config keys; None where PEFT could not load the tensors."""
    from_config: Callable[[Mapping[str, Any]], Any]
    """PEFT's config keys to ours."""
    features: Callable[[Params], tuple[int | None, int | None]]
    """parameters of a site -> its input and output width, None where they do not say it."""
    shared: Mapping[str, str] = {}
    """shared parameter name -> PEFT's whole tensor name. With ``{"v": "x"}``, ``v_0`` is ``x.0``, and ``v_query`` ``x.query``."""
    matches: Callable[[Mapping[str, Any]], bool] | None = None
    """Whether a PEFT config is of this method; None: every one of its ``peft_type``. Needed where one type stands for several methods."""
    aliases: Mapping[str, str] = {}
    """what older versions of PEFT wrote after the module path -> parameter name."""
    site: str | None = None
    """The one site of a method that acts on the model as a whole: PEFT names its tensors without a path, and modules without ``model.``."""
    equivalent: Callable[[Mapping[str, Any], str | None], bool] = lambda sites, task: True
    """Whether PEFT computes the same, by the configs of the sites and PEFT's name of the task; if not, its config is not written."""
    peft_supports: Callable[[Any, Site], bool] = lambda cfg, site: True
    """Whether PEFT itself loads and merges this at such a site; it refuses some of what its files can hold."""
    tied: bool = False
    """Whether PEFT writes the tensors of a tied table a second time, for the head."""
    secondary: PeftSecondary | None = None
    """How PEFT stores the method in another method's folder, if it does."""
    names_sites: bool = True
    """Whether PEFT's config names the modules, and does not count them from the last."""
    from_peft_file: Callable[[PeftContent], PeftContent] | None = None
    """A PEFT file's content -> the pack's: for a method whose tensors say more than the config, or that stores less than PEFT."""
    understood: frozenset[str] = frozenset()
    """Keys of PEFT's config that the reading accounts for, though none is written."""
    dropped: tuple[str, ...] = ()
    """What follows the module path in the names of tensors that PEFT stores for training alone, and that are left out."""
    to_peft_with_base: Completed | None = None
    """Computes, from the base's weights, the config and tensors that PEFT's file needs and the pack does not store."""
    from_peft_with_base: Completed | None = None
    """The reverse, where PEFT's tensors mean nothing without their base: such a pack's folder is never a folder of PEFT's."""
    layers: Mapping[str, PeftLayer] = {}
    """Kind of site -> how PEFT has it there, for kinds other than the method's first. At a kind that is not here PEFT has no such form."""

    def reads(self, config: Mapping[str, Any]) -> bool:
        """Whether a PEFT config is of this method."""
        return config.get("peft_type") == self.peft_type if self.matches is None else self.matches(config)
