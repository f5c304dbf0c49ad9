"""FRoD: decomposes all layers of one role over a shared basis, and adapts them between the two sides of the
decomposition (doi 10.1609/aaai.v40i31.39813).

    W' = U (S + diag(l)) V^T,   W = U diag(l_0) V^T
    V [in, in] shared by the layers of a role,   U [out, in] with columns of length 1

l ``[in]`` starts as l_0. S ``[in, in]`` is zero except at a share ``sparse_rate`` of the places off the
diagonal, which the layers of a role share. V is computed from the weights of all these layers (a higher-order
generalized singular value decomposition) and is stored. U and l_0 are computed from V and the layer's weight
in float64 and rounded to float32, so a fresh adapter equals the layer except for that rounding.

If the layers of a role have fewer rows together than inputs, some directions of V occur in none of their
weights, and U is zero there. PEFT normalises the rounding errors that are left in these directions and uses
them as columns of U, so that its file means something else on every machine; such a file is refused. PEFT
also reads V from its file but computes U from a V that it recomputes with the signs of its own library, so it
can load only packs that came from PEFT (``own_basis`` is false).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any

import numpy as np
from msgspec import Meta

from ..errors import FormatError, Unsupported
from . import (
    LINEAR,
    METHODS,
    NO_EXTRAS,
    TRANSPOSED,
    Arrays,
    Dense,
    Method,
    NormalForm,
    Params,
    PeftConfig,
    PeftContent,
    PeftKeys,
    PositiveFloat,
    Random,
    Seed,
    Shape,
    Shapes,
    Shared,
    Site,
    SiteConfig,
    Storage,
    Traits,
    array_namespace,
    require_places,
    scatter,
    zeros,
)


@dataclass(frozen=True)
class FRoD(SiteConfig):
    """The hyper-parameters of FRoD. ``projection_prng_key`` draws the places of S.

    Example:
        >>> FRoD(sparse_rate=0.02).own_basis
        True
    """

    sparse_rate: Annotated[float, Meta(gt=0, le=1)] = 0.01
    projection_prng_key: Seed = 0
    regularization_alpha: PositiveFloat = 1e-3
    own_basis: bool = True

    @property
    def redundant(self) -> bool:
        """True: V is stored, because it depends on the weights of several layers while an adapter is read
        layer by layer.
        """
        return True


def role(path: str) -> str:
    """Returns the role of a layer, from the end of its path, as PEFT names it.

    Example:
        >>> (role("layers.0.self_attn.q_proj"), role("h.1.q"), role("layer.0.attention.output.dense"),
        ...     role("layer.0.output.dense"))
        ('self_attn_q_proj', 'q', 'attention_output', 'output_dense')
    """
    *before, outer, leaf = ["", "", *path.split(".")][-3:]
    if not outer or outer.isdigit():
        return leaf
    return (
        "attention_output"
        if (before[-1], outer, leaf) == ("attention", "output", "dense")
        else f"{outer}_{leaf}"
    )


def _count(cfg: FRoD, width: int) -> int:
    """Returns how many places of S are not zero."""
    return max(1, min(int(width * width * cfg.sparse_rate), width * width - width))


def _shapes(cfg: FRoD, site: Site) -> Shapes:
    return {"frod_lambda_l": (site.in_features,), "frod_lambda_s_values": (_count(cfg, site.in_features),)}


def _by_role(sites: Sequence[Site]) -> dict[str, list[Site]]:
    roles: dict[str, list[Site]] = {}
    for site in sites:
        roles.setdefault(role(site.path), []).append(site)
    for name, layers in roles.items():
        if len({site.in_features for site in layers}) > 1:
            raise Unsupported(
                "layers of one role have unlike numbers of inputs, and no basis in common",
                where=name,
                found=", ".join(f"{site.path} {site.in_features}" for site in layers[:5]),
                remedy="leave some of them out of the targets",
            )
    return roles


def _shared_shapes(cfg: FRoD, sites: Sequence[Site]) -> Shapes:
    shapes: dict[str, Shape] = {}
    for name, layers in _by_role(sites).items():
        width = layers[0].in_features
        shapes |= {
            f"frod_V_{name}": (width, width),
            f"frod_indices_{name}": (2, _count(cfg, width)),
            f"frod_size_{name}": (2,),
        }
    return shapes


def _init_shared(cfg: FRoD, sites: Sequence[Site], rng: Random) -> Arrays:
    made = {}
    draw = np.random.default_rng(cfg.projection_prng_key)
    for name, layers in sorted(_by_role(sites).items()):
        width = layers[0].in_features
        row, column = np.divmod(
            draw.choice(width * width - width, _count(cfg, width), replace=False), max(width - 1, 1)
        )
        # rounded: for a role with a single layer all directions are equally good, and rounding differences
        # would otherwise choose among them
        made[f"frod_V_{name}"] = _basis(
            [np.asarray(site.weight, np.float32).astype(np.float64) for site in layers],
            cfg.regularization_alpha,
        )
        made[f"frod_indices_{name}"] = np.stack([row, column + (column >= row)])
        made[f"frod_size_{name}"] = np.array([width, width])
    return made


def _basis(weights: Sequence[np.ndarray], ridge: float) -> np.ndarray:
    """Computes V for several weights ``[out, in]``: its columns come from the eigenvectors of the mean of the
    inverse Gram matrices of their parts.
    """
    stacked = np.concatenate(weights)
    width = stacked.shape[1]
    if len(stacked) < width:
        return np.linalg.svd(stacked)[2].T.astype(np.float32)
    # The Gram matrices of the parts of Q sum to the identity, so their inverses can be averaged on one scale.
    Q, R = np.linalg.qr(stacked)
    parts = np.split(Q, np.cumsum([len(weight) for weight in weights])[:-1])
    mean = sum(np.linalg.inv(part.T @ part + ridge * np.eye(width)) for part in parts) / len(parts)
    basis: np.ndarray = (R.T @ np.linalg.eigh(mean)[1]).astype(np.float32)
    return basis


def _sides(V: np.ndarray, weight: Any) -> tuple[np.ndarray, np.ndarray]:
    """Returns U before its columns are normalised, and their norms; float64."""
    wide, target = np.asarray(V, np.float64), np.asarray(weight, np.float64)
    try:
        outer = np.linalg.solve(wide, target.T).T
    except np.linalg.LinAlgError:
        outer = target @ np.linalg.pinv(wide, rcond=1e-6).T
    return outer, np.linalg.norm(outer, axis=0)


_NOISE = 1e-6
"""Relative to the largest column of U diag(l_0): a smaller column contains only rounding errors of V in
float32.
"""


def _init(cfg: FRoD, site: Site, rng: Random) -> Arrays:
    shared = site.shared or _init_shared(cfg, [site], rng)
    return {
        **zeros(_shapes)(cfg, site, rng),
        "frod_lambda_l": _sides(shared[f"frod_V_{role(site.path)}"], site.weight)[1].astype(np.float32),
    }


def _derive(cfg: FRoD, params: Params, site: Site) -> Arrays:
    """Computes U from parameters that come from a file."""
    try:
        require_places(
            np.asarray(params[f"frod_indices_{role(site.path)}"]), (site.in_features, site.in_features)
        )
    except ValueError as error:
        raise FormatError(f"the places of S are not possible: {error}", where=site.path) from error
    outer, lengths = _sides(params[f"frod_V_{role(site.path)}"], site.weight)
    noise = lengths <= _NOISE * lengths.max()
    if noise.any() and not cfg.own_basis:
        raise Unsupported(
            "the layers of this role have fewer rows together than inputs, and PEFT fills the directions "
            "that are left with "
            "what rounding leaves there: what its file means depends on the machine that reads it",
            where=site.path,
            found=f"{int(noise.sum())} of {len(noise)} directions",
            remedy="merge it with PEFT on the machine that trained it",
        )
    return {"U": np.where(noise, 0, outer / np.where(noise, 1, lengths)).astype(np.float32)}


def _normal_form(cfg: FRoD, params: Params, site: Site) -> NormalForm:
    U = params["U"]
    V = params[f"frod_V_{role(site.path)}"]
    lengths = params["frod_lambda_l"]
    name = role(site.path)
    xp = array_namespace(lengths)
    S = scatter(xp, params["frod_lambda_s_values"], params[f"frod_indices_{name}"], (V.shape[0], V.shape[0]))
    turned = xp.matmul(S, V.T) + lengths[:, None] * V.T
    return NormalForm(down=Dense(xp.matmul(U, turned) - site.weight))


_KEYS = PeftKeys(
    FRoD,
    ("sparse_rate", "projection_prng_key", "regularization_alpha", "dropout"),
    {**NO_EXTRAS, "save_projection": True, "progressbar": True, "runtime_offload_base_weight": False},
    renamed={"dropout": "frod_dropout"},
)


def _from_peft(config: PeftConfig) -> Any:
    if config.get("save_projection") is False:
        raise Unsupported(
            "this file leaves out the basis, which comes of the weights of all layers, with the signs of "
            "one machine's library",
            where="save_projection",
            expected="true",
            found="false",
            remedy="save it again with PEFT after setting save_projection=True in its config",
        )
    return replace(_KEYS.from_config(config), own_basis=False)


def _from_peft_file(content: PeftContent) -> PeftContent:
    """Returns the content unchanged, after checking that the basis is not stored in half precision."""
    short = [
        name
        for name, value in content.shared.items()
        if name.startswith("frod_V") and value.dtype.itemsize < 4
    ]
    if short and not content.packed:
        raise Unsupported(
            "the basis is stored in half precision, and PEFT computes the layers' other sides of one that "
            "it makes anew in full: the two no longer belong together",
            where=short[0],
            found=content.shared[short[0]].dtype.name,
            expected="float32",
            remedy="save it again with PEFT in float32",
        )
    return content


frod = METHODS.register(
    Method(
        name="frod",
        summary=(
            "the layers of one role decomposed over one basis, and adapted by sparse entries between its "
            "two sides"
        ),
        paper="https://doi.org/10.1609/aaai.v40i31.39813",
        formula="W' = U (S + diag(l)) V^T,  V shared,  S sparse",
        config=FRoD,
        traits=Traits(
            identity_at_init=False, reads_weight=True, frozen=("frod_V",), layers=LINEAR, min_features=(2, 2)
        ),
        shapes=_shapes,
        init=_init,
        normal_form=_normal_form,
        examples=(FRoD(sparse_rate=0.1), FRoD(sparse_rate=0.3, projection_prng_key=3, dropout=0.1)),
        storage=Storage(
            expanded_size=lambda cfg, site: site.in_features * (2 * site.in_features + site.out_features),
            shared=Shared(_shared_shapes, _init_shared, reads_weights=True),
        ),
        overrides={"derive": _derive},
        peft=_KEYS.form(
            peft_type="FROD",
            suffixes=("frod_lambda_l", "frod_lambda_s_values"),
            layers=TRANSPOSED,
            to_config=lambda sites: None if next(iter(sites.values())).own_basis else _KEYS.to_config(sites),
            from_config=_from_peft,
            features=lambda params: (params["frod_lambda_l"].shape[0], None),
            from_peft_file=_from_peft_file,
            shared={
                "frod_V": "base_model.frod_V",
                "frod_indices": "base_model.frod_s_indices",
                "frod_size": "base_model.frod_s_size",
            },
        ),
    )
)
