"""Runs batches through a bundle, each row with its own adapter: one pass, or answers generated token by
token.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np

from ...pack.pack import Pack
from ...pack.validate.validation import load
from ...tasks.session import Arrays
from ..adapters.mix import Mixes, Names
from ..admission import admit
from ..canary import Replay, replay_one
from ..engine.canary_replay import replay_by_engine
from ..generation.sampling import sampling_of
from ..open_bundle import OpenBundle
from ..pipeline import run_parts
from ..preparing_bundle import PreparingBundle
from .generate import generate


class Session(PreparingBundle):
    """A running bundle. ``provider`` is the name of a provider, a :class:`.Device` with its settings, or None
    for CUDA where there is a card and the CPU elsewhere; ``session.provider`` says which runs. ``threads``
    are those of each operator on the CPU.

    ``mapped`` is for a few runs on the CPU: weights are read from the bundle's files as they are, and not
    laid out anew in memory, without which a run on a quantized graph takes many times longer. ``verify``:
    graphs, weights, adapters, tokenizer and templates are compared with the digests in the manifest: all are
    hashed (``full``), or only those that have changed since they were hashed before (``cached``); ``off`` is
    for a bundle that was verified just now.

    Raises:
        FormatError: the folder is no bundle, its graph reads files outside of it, or a file in it was altered
            or exchanged.
        ProviderError: the provider is unknown or did not start, or leaves nodes of a graph to the CPU.

    Example:
        >>> session = Session("bundle")  # doctest: +SKIP
        >>> session.run(session.encode(["where is my parcel?"]), adapters=["tickets"])["logits"].argmax(
        ...     )  # doctest: +SKIP
        2
    """

    def run(self, inputs: Mapping[str, np.ndarray], adapters: Names = None) -> Arrays:
        """One pass. ``inputs`` are numpy arrays; ``adapters`` names one for each row, None for the base; one
        name holds for all rows.

        Masks, position ids and a cache are supplied where the graph wants them and they are not given. Masks
        and position ids count the rows' own tokens; the virtual tokens of a prompt are added to them. Of a
        task of several graphs those run that have what they read: an encoder whose keys and values are given
        is left out.

        Returns:
            Output name -> array, rows in the order of the inputs. Logits of labels that a row's adapter does
            not have are -1e9.

        Raises:
            UnknownAdapter: a name that the bundle does not hold.
            ConfigError: a missing or unknown input.
        """
        return run_parts(self.frozen(), inputs, adapters)

    def load(
        self, pack: Pack | str | os.PathLike[str], name: str | None = None, *, allow_structural: bool = False
    ) -> str:
        """Puts another pack into a free slot of a running bank, and returns its name. Any thread may, while
        others run.

        ``allow_structural`` accepts a bundle of a base that has the names, dtypes and shapes of the pack's,
        whatever its weights.

        Raises:
            BaseMismatch: the pack belongs to another base, by its manifest or by its canary.
            Unsupported: it is for another task, no slot is free, or it does not fit the graph's slots.
            NothingToDo, ParityError: its canary fails.
        """
        loaded = pack if isinstance(pack, Pack) else load(pack)
        loaded = loaded if name is None else loaded.called(name)

        def held(pack: Pack) -> AbstractContextManager[OpenBundle]:
            return nullcontext(self._with(pack))

        gate = admit(self, loaded, held, _replay, allow_structural=allow_structural)
        with self._changing, gate as changed:
            self._adapters = changed._adapters
        return loaded.name

    def generate(
        self,
        prompts: Sequence[Any] = (),
        adapters: Mixes = None,
        *,
        given: Mapping[str, np.ndarray] | None = None,
        **sampling: Any,
    ) -> list[Any]:
        """Answers to ``prompts``, one batch, each row with its own adapter; ``sampling`` are ``emit`` and the
        fields of ``Sampling``, which are greedy by default; with ``sampling="model"`` the base's
        ``generation_config.json`` has what is left out.

        An adapter is a name, or names with weights, whose changes are added for that row: ``{"orders": 0.7,
        "formal": 0.3}``.

        ``given`` are inputs besides prompts, or in their place: ``pixel_values`` of images,
        ``input_features`` of speech.

        Example:
            >>> session.generate(["Order 12 mugs for Lisbon"], adapters=["orders"],
            ...     max_new_tokens=40)[0].text  # doctest: +SKIP
            '{"item": "mugs", "quantity": 12, "city": "Lisbon"}'
        """
        emit = sampling.pop("emit", None)
        options = sampling_of(sampling, self.generation_config, self.folder)
        return list(generate(self.frozen(), prompts, adapters, options, emit, dict(given or {})))


def _replay(pack: Pack, session: OpenBundle) -> Replay:
    """The canary of a pack that a session holds, on the graph that it opened."""
    if session.bundle.decoder:
        return replay_by_engine(session, [pack])[pack.name]
    return replay_one(session, pack, pack.name)
