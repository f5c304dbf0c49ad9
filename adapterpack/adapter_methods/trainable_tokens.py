"""Trainable tokens: trains chosen rows of an embedding and leaves the others as they are (PEFT's method of
that name).

    E'[i] = D[k] where i is the k-th chosen token, else E[i]

``trainable_tokens_delta``, D ``[k, width]``, holds the new rows themselves, as in PEFT; they start as the
base's. The table is a layer ``[vocabulary, width]``: an embedding looks its rows up, and an output head that
is tied to it multiplies by them, y' = x E'^T, with the same D. A head with its own weight is not changed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import ConfigError, SiteNotFound, Unsupported
from . import (
    METHODS,
    Array,
    Arrays,
    Dense,
    Forward,
    Method,
    NoBranch,
    NormalForm,
    Params,
    PeftContent,
    PeftForm,
    PeftLayer,
    PeftSecondary,
    Random,
    Site,
    Storage,
    Traits,
    array_namespace,
    by_suffix,
    require_whole,
    widths_of,
)


@dataclass(frozen=True, kw_only=True)
class TrainableTokens(NoBranch):
    """Which tokens are trained, by their ids, and in which embedding: the model's input embedding by default.

    Example:
        >>> TrainableTokens(token_indices=(5, 7)).targets
        'input-embedding'
    """

    targets: str | tuple[str, ...] = "input-embedding"
    token_indices: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        for index in self.token_indices:
            require_whole("a token's id", index, 0)
        if len(set(self.token_indices)) < len(self.token_indices):
            raise ValueError(f"token_indices must not name a token twice: {self.token_indices!r}")


def _init(cfg: TrainableTokens, site: Site, rng: Random) -> Arrays:
    if not cfg.token_indices:
        raise ConfigError(
            "no token is named whose row is to be trained",
            where=site.path,
            expected="token_indices",
            remedy="name the tokens' ids in token_indices",
        )
    _require_rows(cfg, site)
    return {"trainable_tokens_delta": np.asarray(site.weight)[list(cfg.token_indices)]}


def _require_rows(cfg: TrainableTokens, site: Site) -> None:
    if beyond := [index for index in cfg.token_indices if index >= site.out_features]:
        raise SiteNotFound(
            "the adapter trains the rows of tokens that the embedding does not have",
            where=site.path,
            expected=f"ids below {site.out_features}",
            found=", ".join(map(str, beyond[:5])),
            remedy="enlarge the vocabulary first: model.resize_token_embeddings(n)",
        )


def _constants(cfg: TrainableTokens, site: Site) -> Arrays:
    """Returns the chosen ids, and for every token its position among them counted from 1, or 0."""
    _require_rows(cfg, site)
    ids = np.array(cfg.token_indices, np.int64)
    place = np.zeros(site.out_features, np.int64)
    place[ids] = 1 + np.arange(len(ids))
    return {"ids": ids, "place": place}


def _change(params: Params, site: Site) -> Array:
    """Returns the difference between the new and the old chosen rows: ``[k, width]``."""
    rows = params["trainable_tokens_delta"]
    weight = site.weight
    xp = array_namespace(rows)
    return rows - xp.astype(xp.take(weight, params["ids"], axis=0), rows.dtype)


def _normal_form(cfg: TrainableTokens, params: Params, site: Site) -> NormalForm:
    change = _change(params, site)
    place = params["place"]
    xp = array_namespace(change)
    chosen = place[:, None] == 1 + xp.arange(change.shape[0], device=change.device)[None, :]
    return NormalForm(down=Dense(change), up=Dense(xp.astype(chosen, change.dtype)))


def _forward(
    cfg: TrainableTokens, params: Params, site: Site, base: Forward, x: Array, drop: Forward
) -> Array:
    """Computes a tied head: adds the change of the chosen rows to the outputs of their tokens, and zero to
    all others.
    """
    xp = array_namespace(x)
    y = base(x)
    gained = xp.matmul(x, _change(params, site).T)
    nothing = xp.zeros((*gained.shape[:-1], 1), dtype=gained.dtype, device=gained.device)
    # Place 0 selects the prepended zero, so tokens that are not trained gain nothing.
    return y + xp.take(xp.concat([nothing, gained], axis=-1), params["place"], axis=-1)


def _fold(
    cfg: TrainableTokens, params: Params, site: Site, weight: Array, bias: Array | None, rows: Any
) -> tuple[Array, Array | None]:
    """Replaces the chosen rows. ``rows`` may also be an array of token ids, whose rows ``weight`` then
    holds.
    """
    xp = array_namespace(weight)
    count = weight.shape[0]
    place = params["place"][rows]
    # Gathers from [weight; delta]: unchanged rows come from the first part, chosen ones from the second.
    source = xp.where(place == 0, xp.arange(count, device=weight.device), place + (count - 1))
    return xp.take(xp.concat([weight, params["trainable_tokens_delta"]], axis=0), source, axis=0), bias


def _reason_of_bias(cfg: TrainableTokens, site: Site) -> str:
    """Returns why PEFT's trained rows of a head have no certain meaning there; empty if they have."""
    return (
        "PEFT leaves out the bias of a head whose rows it trains"
        if site.kind == "linear" and site.bias
        else ""
    )


def _active_together(configs: Sequence[TrainableTokens]) -> bool:
    """Whether the adapters train disjoint sets of tokens."""
    ids = [index for cfg in configs for index in cfg.token_indices]
    return len(set(ids)) == len(ids)


def _append_rows(cfg: TrainableTokens, params: Params, rows: int) -> np.ndarray | None:
    """Returns the rows that extend a table of ``rows`` rows, or None. Raises ValueError if a token between
    the last row and the last trained one is not trained itself, so that its row is unknown.
    """
    new = range(rows, max(cfg.token_indices, default=-1) + 1)
    place = {index: number for number, index in enumerate(cfg.token_indices)}
    if missing := [index for index in new if index not in place]:
        raise ValueError(
            f"the words {', '.join(map(str, missing[:5]))} are new and were not trained: their rows are "
            "in no file"
        )
    appended = params["trainable_tokens_delta"][[place[index] for index in new]]
    return appended if new else None


def _from_secondary(value: Any, path: str) -> TrainableTokens:
    """Returns the tokens of one embedding from the config of another method: a list for the only embedding,
    or a map from the ends of paths to lists.
    """
    if isinstance(value, Mapping):
        value = by_suffix(value, path, None)
    if not isinstance(value, list | tuple):
        raise ValueError(f"the tokens of {path} must be a list of ids, not {value!r:.80}")
    return TrainableTokens(token_indices=tuple(value))


def _untie(content: PeftContent) -> PeftContent:
    """Drops the heads that are tied to a table, whose rows PEFT writes a second time: of modules with equal
    tensors, those that the config does not name.
    """
    targets = content.written.get("target_modules")
    sites = content.sites
    names = [targets] if isinstance(targets, str) else targets if isinstance(targets, list) else []
    named = {path for path in sites if any(f".{path}".endswith(f".{name}") for name in names)}
    kept = {}
    for path, tensors in sites.items():
        twins = {
            twin
            for twin, twin_tensors in sites.items()
            if twin != path
            and tensors.keys() == twin_tensors.keys()
            and all(np.array_equal(tensors[key], twin_tensors[key]) for key in tensors)
        }
        if path in named and twins & named:
            raise Unsupported(
                "two modules have the same rows, and the configuration does not say which is the table",
                where="target_modules",
                found=", ".join(sorted({path} | twins)),
                remedy="name only the embedding in target_modules",
            )
        if path in named or not twins & named:
            kept[path] = tensors
    return content._replace(sites=kept)


trainable_tokens = METHODS.register(
    Method(
        name="trainable_tokens",
        summary="chosen rows of an embedding, and of the output head that is tied to it",
        paper="https://huggingface.co/docs/peft/package_reference/trainable_tokens",
        formula="E'[i] = D[k] for the k-th chosen token i",
        config=TrainableTokens,
        traits=Traits(exclusive=True, reads_weight=True, quantizable=False, layers=("table", "linear")),
        shapes=lambda cfg, site: {"trainable_tokens_delta": (len(cfg.token_indices), site.in_features)},
        init=_init,
        normal_form=_normal_form,
        examples=(TrainableTokens(token_indices=(3,)), TrainableTokens(token_indices=(4, 0, 2))),
        storage=Storage(
            constants=_constants,
            expanded_size=lambda cfg, site: site.out_features * (len(cfg.token_indices) + 1),
        ),
        overrides={
            "forward": _forward,
            "fold": _fold,
            "append_rows": _append_rows,
            "active_together": _active_together,
        },
        peft=PeftForm(
            peft_type="TRAINABLE_TOKENS",
            suffixes={"trainable_tokens_delta": "trainable_tokens_delta"},
            to_config=lambda sites: {
                "token_indices": list(next(iter(sites.values())).token_indices),
                "init_weights": True,
            },
            from_config=lambda config: TrainableTokens(
                token_indices=tuple(config.get("token_indices") or ())
            ),
            features=widths_of("trainable_tokens_delta", None),
            from_peft_file=_untie,
            layers={"linear": PeftLayer(ambiguous_because=_reason_of_bias)},
            peft_supports=lambda cfg, site: not _reason_of_bias(cfg, site),
            overrides={
                "secondary": PeftSecondary(
                    hosts=("LORA",),
                    key="trainable_token_indices",
                    suffixes={"trainable_tokens_delta": "token_adapter.trainable_tokens_delta"},
                    to_config=lambda sites: {path: list(cfg.token_indices) for path, cfg in sites.items()},
                    from_config=_from_secondary,
                )
            },
        ),
    )
)
