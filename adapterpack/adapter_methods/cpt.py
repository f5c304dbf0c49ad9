"""Context-aware prompt tuning: a prompt of examples whose embeddings may move a little (Blau et al. 2024,
arXiv 2410.17222, section 3).

    P_i = E(x_i) + D_i min(1, e_i / |D_i|),   e_i = epsilon sqrt(in / 2048)

Each token of the context has a type: ``type % 4`` is 1 or 3 for the templates around an input and an answer
(``format_epsilon``), 2 for an input (``input_epsilon``), and 0 for a label, which does not move. The paper
projects D after every step; here the projection is part of the formula, which reaches the same prompts. The
loss (section 3.3) is the mean over the row's own labels, with weight 1, and the labels in the context, also
with weight 1 or, with ``decay``, f for the last group of labels, f^2 for the one before it, and so on.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from . import (
    METHODS,
    Arrays,
    FiniteFloat,
    Method,
    Params,
    PeftConfig,
    PromptForm,
    Random,
    Shapes,
    Site,
    Storage,
    array_namespace,
    require_whole,
)
from .forms.prompt import STORED, EmbeddingConfig, embed, embedding_fields, peft_form, traits

_DELTA = "delta_embedding"


@dataclass(frozen=True, kw_only=True)
class CPT(EmbeddingConfig):
    """``token_ids`` (or ``text``) is the context, ``token_types`` the type of each of its tokens (none given:
    all are 1).

    ``baked`` means that the pack stores the final embeddings.

    Example:
        >>> CPT(token_ids=(5, 6, 7), token_types=(1, 2, 4)).num_virtual_tokens
        3
    """

    token_types: tuple[int, ...] = ()
    opt_weighted_loss_type: Literal["none", "decay"] = "none"
    opt_loss_decay_factor: FiniteFloat = 1.0
    input_epsilon: FiniteFloat = 0.1
    format_epsilon: FiniteFloat = 0.1
    baked: bool = False

    def __post_init__(self) -> None:
        if self.token_ids:
            object.__setattr__(self, "num_virtual_tokens", len(self.token_ids))
        super().__post_init__()
        for kind in self.token_types:
            require_whole("token_types", kind, 0)
        if self.token_ids and len(self.token_types) not in {0, len(self.token_ids)}:
            raise ValueError(
                f"token_types must say one for each of {len(self.token_ids)} token_ids, not "
                f"{len(self.token_types)}"
            )

    @property
    def learnt(self) -> tuple[tuple[int, int, float], ...]:
        """The labels in the context with their weights in the loss. The first token of the context is never
        predicted, because nothing precedes it.
        """
        factor = self.opt_loss_decay_factor if self.opt_weighted_loss_type == "decay" else 1.0
        kinds = sorted({kind for kind in self.token_types if kind > 0 and kind % 4 == 0}, reverse=True)
        place = {kind: number for number, kind in enumerate(kinds, 1)}
        pairs = enumerate(zip(self.token_ids, self.token_types, strict=False))
        return tuple(
            (at, token, factor ** place[kind]) for at, (token, kind) in pairs if at and kind in place
        )


def _constants(cfg: CPT, site: Site) -> Arrays:
    """Returns ``e`` of every token, ``[n, 1]``; 0 for tokens that do not move."""
    if cfg.baked:
        return {}
    kinds = np.array(cfg.token_types or [1] * cfg.num_virtual_tokens)
    epsilons = np.array([0.0, cfg.format_epsilon, cfg.input_epsilon, cfg.format_epsilon])
    radii = epsilons * (site.in_features / 2048) ** 0.5
    return {"radii": radii[kinds % 4][:, None].astype(np.float32)}


def _shapes(cfg: CPT, site: Site) -> Shapes:
    wide = (cfg.num_virtual_tokens, site.in_features)
    return {STORED: wide} if cfg.baked else {STORED: wide, _DELTA: wide}


def _init(cfg: CPT, site: Site, rng: Random) -> Arrays:
    if not cfg.token_ids:
        raise ValueError("the context is missing: name token_ids, or a text")
    context = embed(site, cfg.token_ids)
    return {STORED: context, _DELTA: np.zeros_like(context)}


def _normal_form(cfg: CPT, params: Params, site: Site) -> PromptForm:
    context = params[STORED]
    if cfg.baked:
        return PromptForm(embeds=context)
    delta = params[_DELTA]
    radii = params["radii"]
    xp = array_namespace(delta)
    square = xp.sum(delta * delta, axis=1, keepdims=True)
    inside = square <= radii * radii
    # avoids the root of zero, whose gradient is infinite
    norm = xp.sqrt(xp.where(inside, xp.ones_like(square), square))
    return PromptForm(
        embeds=context + delta * xp.where(inside, xp.astype(radii > 0, delta.dtype), radii / norm)
    )


def _to_pack(cfg: CPT, params: Params, site: Site) -> tuple[CPT, Arrays]:
    constants = (
        {name: value.astype(params[_DELTA].dtype) for name, value in _constants(cfg, site).items()}
        if _DELTA in params
        else {}
    )
    return replace(cfg, baked=True), {
        STORED: np.asarray(_normal_form(cfg, {**params, **constants}, site).embeds, np.float32)
    }


def _to_peft(cfg: CPT) -> PeftConfig:
    ids = list(cfg.token_ids) or [0] * cfg.num_virtual_tokens
    return {
        "cpt_token_ids": ids,
        "cpt_mask": [1] * len(ids),
        "cpt_tokens_type_mask": list(cfg.token_types) or [1] * len(ids),
        "opt_projection_epsilon": cfg.input_epsilon,
        "opt_projection_format_epsilon": cfg.format_epsilon,
        "opt_weighted_loss_type": cfg.opt_weighted_loss_type,
        "opt_loss_decay_factor": cfg.opt_loss_decay_factor,
        "tokenizer_name_or_path": None,
    }


def _from_peft(config: PeftConfig) -> CPT:
    ids = tuple(config.get("cpt_token_ids") or ())
    kinds = tuple(config.get("cpt_tokens_type_mask") or ())
    return CPT(
        **embedding_fields(config),
        token_ids=ids,
        token_types=kinds,
        input_epsilon=config.get("opt_projection_epsilon", 0.1),
        format_epsilon=config.get("opt_projection_format_epsilon", 0.1),
        baked=True,
        opt_weighted_loss_type=config.get("opt_weighted_loss_type", "none"),
        opt_loss_decay_factor=config.get("opt_loss_decay_factor", 1.0),
    )


cpt = METHODS.register(
    Method(
        name="cpt",
        summary="examples as a prompt whose embeddings move within a ball around their words",
        paper="https://arxiv.org/abs/2410.17222",
        formula="P_i = E(x_i) + D_i min(1, e_i / |D_i|) before the first token",
        kind="prompt",
        config=CPT,
        traits=traits((STORED,)),
        shapes=_shapes,
        init=_init,
        normal_form=_normal_form,
        examples=(
            CPT(token_ids=(4, 5, 6), token_types=(1, 2, 3), input_epsilon=40.0, format_epsilon=30.0),
            CPT(token_ids=(7, 5), token_types=(1, 1)),
            CPT(
                token_ids=(9, 4, 5, 6),
                token_types=(4, 1, 4, 8),
                opt_weighted_loss_type="decay",
                opt_loss_decay_factor=0.5,
            ),
        ),
        storage=Storage(constants=_constants, to_stored=_to_pack),
        peft=peft_form("CPT", _to_peft, _from_peft),
    )
)
