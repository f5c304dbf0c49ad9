"""Runs batches through a bundle, each row with its own adapter: one pass, or answers generated token by
token.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from ...adapter_methods import Tensors
from ...errors import ConfigError
from ...pack import AUTO, Pack, TextIndex, TextProfile, as_pack
from ...paths import StrPath
from ...tasks import Arrays
from ...tasks.data import Picture
from ..adapters import Mixes, Names
from ..admission import require_canary, require_runnable
from ..canary import Replay, replay_one
from ..engine import replay_by_engine
from ..generation import sampling_of
from ..media import SeenPicture, join_pictures
from ..open_bundle import OpenBundle
from ..pipeline import run_parts
from ..prompts import Prompt, first_ids, see
from .generate import generate


class Session(OpenBundle):
    """A running bundle. ``provider`` is the name of a provider, a :class:`.Device` with its settings, or None
    for CUDA if there is a GPU and the CPU otherwise; ``session.provider`` names the one that runs.
    ``threads`` is the number of threads of each operator on the CPU.

    ``mapped`` is for a few runs on the CPU: it reads weights directly from the bundle's files instead of
    repacking them in memory, except up to 4 GB of codes, without which such runs would be many times slower.
    ``verify`` says how files are compared with the digests in the manifest: ``full`` hashes graphs, weights,
    adapters, tokenizer and templates; ``cached`` hashes only those that have changed since they were last
    hashed; ``off`` is for a bundle that was verified a moment ago.

    Raises:
        FormatError: the folder is no bundle, its graph reads files outside of it, or a file in it was altered
            or swapped.
        ProviderError: the provider is unknown or did not start, or leaves nodes of a graph to the CPU.

    Example:
        >>> session = Session("bundle")  # doctest: +SKIP
        >>> session.run(session.encode(["where is my parcel?"]), adapters=["tickets"])["logits"].argmax(
        ...     )  # doctest: +SKIP
        2
    """

    def run(self, inputs: Tensors, adapters: Names = None) -> Arrays:
        """Runs one pass. ``inputs`` are numpy arrays; ``adapters`` names one for each row (None for the
        base), or a single one for all rows.

        Adds masks, position ids and a cache if the graph takes them and they are missing. Masks and position
        ids cover the rows' own tokens; the virtual tokens of a prompt are added to them. In a task of several
        graphs, those run whose inputs are present: an encoder is skipped if its keys and values are passed.

        Returns:
            Output name -> array, rows in the order of the inputs. Logits of labels that a row's adapter does
            not have are -1e9.

        Raises:
            UnknownAdapter: the bundle has no adapter of a name.
            ConfigError: an input is missing or unknown.
        """
        return run_parts(self.freeze(), inputs, adapters)

    def see(self, prompt: Prompt, pictures: Sequence[Picture] = ()) -> tuple[list[int], list[SeenPicture]]:
        """Returns the token ids of a prompt with pictures, and what was read of these; see
        :func:`adapterpack.runtime.prompts.see`.
        """
        return see(self, prompt, pictures)

    def images(self, seen: Sequence[SeenPicture]) -> Arrays:
        """Returns the arrays of pictures that :meth:`see` read, for ``given`` of :meth:`generate`."""
        return join_pictures(seen)

    def choose(self, *texts: object) -> tuple[str | None, float]:
        """Returns the adapter that was trained on texts like these, as far as packs tell of their texts
        (``adapterpack measure --kind texts``), or None if the base is likelier; and how sure that is, from
        0.5 to 1. A text may be a list of messages, or of token ids.

        Raises:
            ConfigError: no pack tells of its texts.

        Example:
            >>> session.choose("Where is my parcel?")  # doctest: +SKIP
            ('tickets', 0.98)
        """
        packs = self.packs
        index = TextIndex()
        if self._opened.get(AUTO, (None,))[0] is packs:
            index = self._opened[AUTO][1]
        else:
            for name, pack in packs.items():
                index.put(name, TextProfile.of(pack))
            self._opened[AUTO] = packs, index
        if not any(name in index for name in packs):
            raise ConfigError(
                "no adapter tells what texts it was trained on, so none can be chosen by a text",
                where=self.folder,
                remedy="measure its pack with adapterpack measure --kind texts, or name an adapter",
            )
        return index.choose(first_ids(self, texts))

    def load(self, pack: Pack | StrPath, name: str | None = None, *, allow_structural: bool = False) -> str:
        """Loads another pack into a free slot of a running bank, and returns its name. Any thread may call it
        while others run rows.

        ``allow_structural`` accepts a bundle whose base has the names, dtypes and shapes of the pack's base,
        whatever its weights.

        Raises:
            BaseMismatch: the pack belongs to another base, by its manifest or by its canary.
            Unsupported: the pack is for another task, no slot is free, or it does not fit the graph's slots.
                One with a larger rank than they hold is taken where the bundle has the engine's graph: it
                generates, and :meth:`run` refuses it.
            NothingToDo, ParityError: its canary fails.
        """
        loaded = as_pack(pack)
        loaded = loaded if name is None else loaded.called(name)
        with self._changing:
            reason = require_runnable(self, loaded, allow_structural=allow_structural)
            changed = self._with(loaded)
            require_canary(self, loaded, reason, partial(_replay, loaded, changed))
            self._adapters = changed._adapters
        return loaded.name

    def generate(
        self,
        prompts: Sequence[Any] = (),
        adapters: Mixes = None,
        *,
        given: Tensors | None = None,
        **sampling: Any,
    ) -> list[Any]:
        """Generates answers to ``prompts`` in one batch, each row with its own adapter. ``sampling`` are
        ``emit`` and the fields of ``Sampling``; parameters that it leaves out are greedy defaults, or with
        ``sampling="model"`` those of the base's ``generation_config.json``.

        An adapter is a name, or names with weights, whose changes are added for that row: ``{"orders": 0.7,
        "formal": 0.3}``. ``given`` are inputs besides prompts or in their place: ``pixel_values`` of images,
        ``input_features`` of speech.

        Example:
            >>> session.generate(["Order 12 mugs for Lisbon"], adapters=["orders"],
            ...     max_new_tokens=40)[0].text  # doctest: +SKIP
            '{"item": "mugs", "quantity": 12, "city": "Lisbon"}'
        """
        emit = sampling.pop("emit", None)
        options = sampling_of(sampling, self.generation_config, self.folder)
        return list(generate(self.freeze(), prompts, adapters, options, emit, dict(given or {})))


def _replay(pack: Pack, session: OpenBundle) -> Replay:
    """Replays the canary of a pack on the graph that the session has open."""
    if session.bundle.decoder:
        return replay_by_engine(session, [pack])[pack.name]
    return replay_one(session, pack, pack.name)
