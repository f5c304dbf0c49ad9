"""A bundle with one adapter in its weights has one model: the adapter, under its pack's name or another, and
no base.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from adapterpack import Engine, Session, export
from adapterpack.errors import Unsupported
from adapterpack.http.http_error import HTTPError
from adapterpack.serving.catalogue import Catalogue
from adapterpack.serving.scheduling.admission import Admission
from adapterpack.serving.tenants.keys import EVERYBODY
from adapterpack.serving.tenants.limits import ServerLimits

Make = Callable[..., Any]


@pytest.fixture(scope="module")
def texts(base_of: Make, pack_of: Make, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("folded") / "bundle"
    export(base_of("llama"), [pack_of("llama", "alpha")], folder, mode="folded", in_place=True)
    return folder


@pytest.mark.long
@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_the_adapter_is_the_model(kind: str, texts: Path, bundle_of: Make) -> None:
    """Rows that name it and rows that name none have it, and its digest; the base is not there, nor is
    another adapter loaded.
    """
    folder = texts if kind == "llama" else bundle_of("bert", "folded")
    session, engine = Session(folder, "cpu"), Engine(folder, "cpu")
    catalogue = Catalogue(engine)
    (model,) = catalogue.visible(EVERYBODY)
    assert (model.name, model.adapter, model.digest) == ("alpha", "alpha", session.pack("alpha").id)
    assert catalogue.find_model("alpha", EVERYBODY) == model
    with pytest.raises(HTTPError) as caught:
        catalogue.find_model(catalogue.base, EVERYBODY)
    assert caught.value.status == 404
    prompt, options = [5, 9, 7, 11], {"max_new_tokens": 5} if kind == "llama" else {}
    requests = [engine.add(prompt, name, **options) for name in ("alpha", None)]
    ends = {}
    while engine.busy:
        ends |= {event.request: event for event in engine.step() if event.finish_reason}
    assert {ends[number].adapter for number in requests} == {model.digest}
    if kind == "llama":
        assert {ends[number].text for number in requests} == {
            session.generate([prompt], "alpha", **options)[0].text
        }
    other = Catalogue(engine, "mine")
    assert [one.name for one in other.visible(EVERYBODY)] == ["mine"]
    assert other.find_model("mine", EVERYBODY).digest == model.digest
    with pytest.raises(Unsupported):
        engine.adapters.load(session.pack("alpha").renamed("other"))


@pytest.mark.fast
def test_who_waits_is_told_how_many_turns() -> None:
    """A batch of encoder rows takes one turn of the engine, whatever its rows; of a decoder so many answers
    run at a time.
    """
    for rows, rows_a_turn, seconds in ((32, 32, 24), (8, 1, 3)):
        engine: Any = SimpleNamespace(max_rows=rows, rows_a_turn=rows_a_turn)
        gate = Admission.of(engine, ServerLimits(open_rows=24, open_rows_a_key=24))
        with gate.admit(EVERYBODY, 24), pytest.raises(HTTPError) as caught, gate.admit(EVERYBODY, 1):
            pass
        assert caught.value.more["retry_after"] == seconds
