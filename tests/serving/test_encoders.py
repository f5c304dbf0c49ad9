"""Bundles of encoders over HTTP: vectors, labels and tensors of many adapters at once equal what each gives
alone.
"""

from __future__ import annotations

import asyncio
import base64
import json
import os
import random
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from encoder_packs import packed, words
from servers import ANN, BOB, Served, waited
from test_offline_runs import kept, ran, written

from adapterpack import Engine, Session, compose, export, run
from adapterpack.errors import ConfigError, Unsupported
from adapterpack.serving.api import apis_of
from adapterpack.serving.serve import serve
from adapterpack.serving.tenants.limits import ServerLimits

Make = Callable[..., Any]
COUNT = 30


@pytest.fixture(scope="module")
def embedder(launch: Make, features: Path) -> Served:
    served: Served = launch(features, limits={"inputs": 40, "body_seconds": 5.0})
    return served


@pytest.fixture(scope="module")
def ranking(tiny_bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A head with one label."""
    return packed(
        tiny_bert,
        tmp_path_factory.mktemp("ranking"),
        "text-classification",
        "ranking",
        ["relevant"],
        r=1,
        modules_to_save=("classifier",),
    )


@pytest.fixture(scope="module")
def classifier(launch: Make, bundle_of: Make, ranking: Path) -> Served:
    served: Served = launch(bundle_of("bert", "bank"), adapters=[str(ranking)])
    return served


def test_vectors_of_many_at_once(embedder: Served, features: Path) -> None:
    """OpenAI's client, 30 requests at a time with three models: numbers and bytes, texts and token ids, one
    and several, cut and raw; each vector is the session's of its row alone, with the digest of the pack.
    """
    session, dice = Session(features, "cpu"), random.Random(1)
    asked = [
        (
            [words(dice, 20) for _ in range(dice.choice([1, 1, 7]))],
            dice.choice([None, "alpha", "another"]),
            number % 3,
            number % 2,
        )
        for number in range(COUNT)
    ]

    def tokens(text: str) -> list[int]:
        return [int(token) for token in session.encode([text])["input_ids"][0]]

    async def one(
        client: openai.AsyncOpenAI, texts: list[str], name: str | None, kind: int, coded: int
    ) -> Any:
        given: Any = [tokens(text) for text in texts] if kind == 1 else texts
        # the client's own way is base64
        options: dict[str, Any] = {} if coded else {"encoding_format": "float"}
        if kind == 2:
            options |= {"dimensions": 5} if coded else {"extra_body": {"normalize": False}}
        model = "base" if name is None else f"base:{name}" if coded else name
        return await client.embeddings.create(
            model=model, input=given[0] if len(given) == 1 else given, **options
        )

    async def every() -> list[Any]:
        async with openai.AsyncOpenAI(
            base_url=f"{embedder.address}/v1", api_key=ANN, max_retries=0, timeout=120
        ) as client:
            return await asyncio.gather(*(one(client, *what) for what in asked))

    for (texts, name, kind, coded), answer in zip(asked, asyncio.run(every()), strict=True):
        assert [item.index for item in answer.data] == list(range(len(texts)))
        assert (
            answer.usage.prompt_tokens
            == answer.usage.total_tokens
            == sum(len(tokens(text)) for text in texts)
        )
        if name is not None:
            assert answer.system_fingerprint == answer.adapterpack["digest"] == session.pack(name).id
        for text, item in zip(texts, answer.data, strict=True):
            vector = session.run(session.encode([text]), name)["last_hidden_state"][0].mean(0)[
                : 5 if kind == 2 and coded else None
            ]
            wanted = vector if kind == 2 and not coded else vector / np.linalg.norm(vector)
            np.testing.assert_allclose(item.embedding, wanted, rtol=0, atol=1e-5)
    figures = dict(
        line.split()
        for line in embedder.get("/metrics").text.splitlines()
        if line.startswith("adapterpack_passe")
    )
    rows = sum(len(texts) for texts, *_ in asked)
    assert float(figures["adapterpack_passed_rows"]) == rows
    assert float(figures["adapterpack_passes"]) < rows  # those of a request, at the least, go together
    coded_answer = embedder.post(
        "/v1/embeddings", {"model": "alpha", "input": "w1 w2", "encoding_format": "base64"}
    )
    plain = embedder.post("/v1/embeddings", {"model": "alpha", "input": "w1 w2"})
    data = np.frombuffer(base64.b64decode(coded_answer.json()["data"][0]["embedding"]), "<f4")
    np.testing.assert_array_equal(data, np.array(plain.json()["data"][0]["embedding"], np.float32))
    assert plain.headers["X-Adapterpack-Digest"] == embedder.adapters["alpha"]


def test_vectors_of_a_mix(embedder: Served, features: Path, tmp_path: Path) -> None:
    """Two adapters with weights give the vector of the pack that ``compose`` makes of them, which has their
    ranks together.
    """
    weights = {"alpha": 0.5, "another": -2.0}
    both = compose(
        [features.parent / name for name in weights],
        weights=[*weights.values()],
        name="both",
        out=tmp_path / "both",
    )
    session = Session(features, "cpu")
    session.load(both)
    mix = [{"name": name, "weight": weight} for name, weight in weights.items()]
    answer = embedder.post(
        "/v1/embeddings", {"model": "base", "adapters": mix, "input": ["w1 w2 w3", "w4"], "normalize": False}
    )
    for text, item in zip(("w1 w2 w3", "w4"), answer.json()["data"], strict=True):
        wanted = session.run(session.encode([text]), "both")["last_hidden_state"][0].mean(0)
        np.testing.assert_allclose(item["embedding"], wanted, rtol=0, atol=1e-5)
    assert answer.headers["X-Adapterpack-Adapter"] == "alpha*0.5+another*-2.0"


def test_labels_of_many_at_once(classifier: Served, bundle_of: Make, ranking: Path) -> None:
    """Texts and pairs by adapters with heads of one, two and three labels, at once: scores are those of a run
    alone, by the pack's own names; documents come in the order of a head with one label.
    """
    session, dice = Session(bundle_of("bert", "bank"), "cpu"), random.Random(2)
    session.load(ranking)

    def alone(row: Any, name: str) -> dict[str, float]:
        pair = isinstance(row, dict)
        inputs = session.encode_pairs([(row["text"], row["text_pair"])])[0] if pair else session.encode([row])
        labels = list(session.labels(name) or ())
        logits = session.run(inputs, name)["logits"][0, : len(labels)].astype(float)
        weights = np.exp(logits) / (np.exp(logits).sum() if len(labels) > 1 else 1 + np.exp(logits))
        return dict(zip(labels, weights.tolist(), strict=True))

    def rows() -> list[Any]:
        count = dice.choice([1, 5])
        if dice.random() < 0.5:
            return [words(dice, 20) for _ in range(count)]
        return [{"text": words(dice, 9), "text_pair": words(dice, 20)} for _ in range(count)]

    asked = [(rows(), dice.choice(["alpha", "beta", "ranking"])) for _ in range(COUNT)]

    async def every() -> list[httpx.Response]:
        async with httpx.AsyncClient(
            base_url=classifier.address, headers=classifier.headers, timeout=120
        ) as client:
            return await asyncio.gather(
                *(client.post("/v1/classify", json={"model": name, "input": given}) for given, name in asked)
            )

    for (given, name), answer in zip(asked, asyncio.run(every()), strict=True):
        body = answer.json()
        assert answer.status_code == 200, body
        assert answer.headers["X-Adapterpack-Digest"] == body["system_fingerprint"] == session.pack(name).id
        for row, said in zip(given, body["data"], strict=True):
            wanted = alone(row, name)
            assert said["scores"] == pytest.approx(wanted, abs=1e-5)
            assert said["label"] == max(wanted, key=lambda label: wanted[label])
    documents = [words(dice, 9) for _ in range(6)]
    ranked = classifier.post(
        "/v1/rerank",
        {"model": "ranking", "query": "w3 w4", "documents": documents, "top_n": 4, "return_documents": True},
    ).json()["results"]
    scores = {
        place: alone({"text": "w3 w4", "text_pair": text}, "ranking")["relevant"]
        for place, text in enumerate(documents)
    }
    best = sorted(scores, key=lambda place: -scores[place])[:4]
    assert [item["relevance_score"] for item in ranked] == pytest.approx(
        [scores[place] for place in best], abs=1e-5
    )
    assert [item["document"]["text"] for item in ranked] == [documents[item["index"]] for item in ranked]


@pytest.fixture(scope="module")
def tagger(launch: Make, tiny_bert: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Served, Path]:
    """Labels of tokens."""
    folder = tmp_path_factory.mktemp("tagger")
    pack = packed(
        tiny_bert,
        folder,
        "token-classification",
        "places",
        ["O", "CITY"],
        r=2,
        modules_to_save=("classifier",),
    )
    export(tiny_bert, [pack], folder / "bundle", mode="bank", task="token-classification")
    return launch(folder / "bundle"), folder / "bundle"


def test_labels_of_tokens_have_a_route_of_their_own(tagger: tuple[Served, Path]) -> None:
    """What ``run`` answers; a text that begins like an address of data is a text, and a question is none."""
    server, bundle = tagger
    texts = ["w1 w2", "data:image/png;base64,w3"]
    answer = server.post("/v1/predict", {"model": "places", "input": texts})
    assert answer.status_code == 200, answer.text
    given = run(bundle, [{"text": text, "adapter": "places"} for text in texts])
    for place, (found, wanted) in enumerate(zip(answer.json()["data"], given, strict=True)):
        assert found == {"index": place, "entities": wanted["entities"], "tokens": wanted["tokens"]}
    asked = {"model": "places", "input": {"question": "w1", "context": "w2"}}
    assert server.post("/v1/predict", asked).status_code == 400


def inferred(
    server: Served, model: str, texts: list[str], **more: Any
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The outputs of one inference, in their shapes."""
    inputs = [
        {"name": "text", "shape": [len(texts)], "datatype": "BYTES", "data": texts},
        *more.pop("columns", []),
    ]
    answer = server.post(f"/v2/models/{model}/infer", {"inputs": inputs, **more})
    assert answer.status_code == 200, answer.text
    body = answer.json()
    assert answer.headers["X-Adapterpack-Digest"] == body["model_version"] == body["parameters"]["digest"]
    kinds = {"BYTES": object, "FP32": np.float32, "INT64": np.int64}
    return {
        one["name"]: np.array(one["data"], kinds[one["datatype"]]).reshape(one["shape"])
        for one in body["outputs"]
    }, body


@pytest.mark.long
def test_open_inference_protocol(
    embedder: Served, classifier: Served, tagger: tuple[Served, Path], bundle_of: Make
) -> None:
    """Metadata say what an inference gives, for three tasks; numbers are those of the other routes and of the
    session.
    """
    texts = ["w1 w2", "w3", "w4 w5 w6"]
    assert embedder.get("/v2").json()["name"] == "adapterpack"
    for path in ("/v2/health/live", "/v2/health/ready", "/v2/models/alpha/ready"):
        assert embedder.get(path).json().items() >= {path.rpartition("/")[2]: True}.items()
    for server, model in (
        (embedder, "alpha"),
        (embedder, "base"),
        (classifier, "beta"),
        (tagger[0], "places"),
    ):
        card = server.get(f"/v2/models/{model}").json()
        outputs, body = inferred(server, model, texts, id="seven")
        assert (card["name"], card["versions"], body["id"]) == (model, [body["model_version"]], "seven")
        assert [one["name"] for one in card["outputs"]] == list(outputs)
        for one in card["outputs"]:
            assert all(
                extent in (-1, own)
                for extent, own in zip(one["shape"], outputs[one["name"]].shape, strict=True)
            )
    embeddings = embedder.post("/v1/embeddings", {"model": "alpha", "input": texts, "dimensions": 6}).json()[
        "data"
    ]
    outputs, _ = inferred(embedder, "alpha", texts, parameters={"dimensions": 6})
    np.testing.assert_allclose(
        outputs["embedding"], [item["embedding"] for item in embeddings], rtol=0, atol=1e-6
    )
    pairs = [{"name": "text_pair", "shape": [3, 1], "datatype": "BYTES", "data": [["w7"], ["w8 w9"], ["w1"]]}]
    outputs, _ = inferred(classifier, "beta", texts, columns=pairs)
    given = [{"text": text, "text_pair": pair[0]} for text, pair in zip(texts, pairs[0]["data"], strict=True)]  # type: ignore[misc]
    labels = classifier.post("/v1/classify", {"model": "beta", "input": given}).json()["data"]
    assert [dict(zip(outputs["labels"], row, strict=True)) for row in outputs["scores"]] == [
        pytest.approx(one["scores"]) for one in labels
    ]
    assert outputs["label"].tolist() == [one["label"] for one in labels]
    session = Session(tagger[1], "cpu")
    outputs, _ = inferred(
        tagger[0], "places", texts, outputs=[{"name": name} for name in ("row", "start", "end", "score")]
    )
    assert list(outputs) == ["row", "start", "end", "score"]
    found = [
        texts[row][start:stop]
        for row, start, stop in zip(outputs["row"], outputs["start"], outputs["end"], strict=True)
    ]
    assert found == " ".join(texts).split()
    logits = np.concatenate([session.run(session.encode([text]), "places")["logits"][0] for text in texts])
    shares = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    np.testing.assert_allclose(outputs["score"], shares.max(1), rtol=0, atol=1e-5)


def test_who_has_no_head_is_told_apart(classifier: Served, embedder: Served) -> None:
    """The page begins with models that can answer: each answer of a base without a trained head is an
    error.
    """
    labels, vectors = (
        {one["name"]: one["headless"] for one in server.get("/v1/status/models").json()["models"]}
        for server in (classifier, embedder)
    )
    assert labels == {"base": True, "alpha": False, "beta": False, "ranking": False}
    assert not any(vectors.values())
    answer = classifier.post("/v1/classify", {"model": "base", "input": "w1"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "no_head")


def test_the_lines_of_the_page(server: Served, embedder: Served, classifier: Served) -> None:
    """Each ``curl`` of docs/serve.md is answered as it stands, by a server of its kind; the page's names
    stand for adapters of these.
    """
    page = (Path(__file__).parents[2] / "docs" / "serve.md").read_text("utf-8")
    lines = [line.strip() for line in page.splitlines() if line.startswith("    curl ")]
    lines = [line for line in lines if "/v1/audio/" not in line]  # of a server that hears: test_media.py
    servers = {
        "/v1/models": server,
        "/v1/chat/completions": server,
        "/v1/completions": server,
        "/v1/embeddings": embedder,
        "/v1/classify": classifier,
        "/v1/rerank": classifier,
    }
    assert {path for path in servers for line in lines if f"$SERVER{path} " in line} == set(servers)
    for line in lines:
        one = next(one for path, one in servers.items() if f"$SERVER{path} " in line)
        command = line.replace('"tickets"', '"alpha"').replace('"claims"', '"alpha"')
        done = subprocess.run(
            ["bash", "-c", f"{command} -sS --fail-with-body"],
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
            env={**os.environ, "SERVER": one.address, "KEY": ANN},
        )
        assert done.returncode == 0, (line, done.stdout, done.stderr)
        said = (
            {"system_fingerprint": "[DONE]" in done.stdout} if "stream" in line else json.loads(done.stdout)
        )
        assert said.get("system_fingerprint") or said["data"], line


def refused(server: Served, path: str, body: Any, **options: Any) -> tuple[int, str, str | None]:
    answer = server.post(path, body, **options)
    error = answer.json()["error"]
    assert "/tmp" not in answer.text
    return answer.status_code, error["code"], error["param"]


def test_what_is_refused(embedder: Served, classifier: Served) -> None:
    """Each by the field at fault; a server has the routes of its bundle alone."""
    bob = {"headers": {"Authorization": f"Bearer {BOB}"}}
    good: dict[str, Any] = {"model": "alpha", "input": "w1"}
    for change, status, code, param in (
        ({"input": []}, 400, "invalid_request", "input"),
        ({"input": ""}, 400, "invalid_request", "input"),
        ({"input": ["w1"] * 41}, 400, "invalid_request", "input"),
        ({"input": "w1 " * 65}, 400, "invalid_request", "input"),
        ({"input": "w" * 500_000}, 400, "invalid_request", "input"),
        ({"input": ["w1", [1]]}, 400, "invalid_request", "input"),
        ({"input": [10**6]}, 400, "invalid_request", "input"),
        ({"input": [-1]}, 400, "invalid_request", "input"),
        ({"input": [[]]}, 400, "invalid_request", "input"),
        ({"input": {"text": "w1"}}, 400, "invalid_request", "input"),
        ({"input": [[1] * 65, [2]]}, 400, "invalid_request", "input"),
        ({"dimensions": 25}, 400, "invalid_request", "dimensions"),
        ({"dimensions": 0}, 400, "invalid_request", "dimensions"),
        ({"encoding_format": "hex"}, 400, "invalid_request", "encoding_format"),
        ({"truncate": True}, 400, "unknown_parameter", "truncate"),
        ({"model": "../alpha"}, 404, "model_not_found", "model"),
        ({"model": "nobody"}, 404, "model_not_found", "model"),
    ):
        assert refused(embedder, "/v1/embeddings", {**good, **change}) == (status, code, param), change
    assert refused(embedder, "/v1/embeddings", {**good, "model": "another"}, **bob) == (
        404,
        "model_not_found",
        "model",
    )
    for key, near in ({}, "; did you mean 'another'? GET"), (bob, ": GET"):  # no key learns what others have
        answer = embedder.post("/v1/embeddings", {**good, "model": "anothre"}, **key)
        assert f"there is no model 'anothre'{near}" in answer.json()["error"]["message"]
    assert refused(embedder, "/v1/embeddings", good, headers={}) == (401, "invalid_api_key", None)
    assert refused(classifier, "/v1/classify", {**good, "model": "base"}) == (400, "no_head", "model")
    assert refused(classifier, "/v1/classify", {**good, "input": {"text": "w1", "text_pair": 5}})[:2] == (
        400,
        "invalid_request",
    )
    assert refused(classifier, "/v1/rerank", {"model": "alpha", "query": "w1", "documents": ["w2"]}) == (
        400,
        "no_ranking_head",
        "model",
    )
    column = {"name": "text", "shape": [1], "datatype": "BYTES", "data": ["w1"]}
    changes: tuple[dict[str, Any], ...] = (
        {"shape": [2]},
        {"shape": [10**12]},
        {"datatype": "FP32", "data": [1.0]},
        {"name": "input_ids"},
        {"name": "text_pair"},
        {"data": [""]},
        {"parameters": {"binary_data_size": 9}},
    )
    bodies: tuple[dict[str, Any], ...] = (
        *({"inputs": [{**column, **change}]} for change in changes),
        {"inputs": []},
        {"inputs": [column, column]},
        {"inputs": [column], "outputs": [{"name": "nothing"}]},
        {"inputs": [column], "parameters": {"binary_data_output": True}},
        {"inputs": [column], "parameters": {"dimensions": 99}},
    )
    for body in bodies:
        answer = embedder.post("/v2/models/alpha/infer", body)
        assert (answer.status_code, list(answer.json())) == (400, ["error"]), body
        assert isinstance(answer.json()["error"], str)
    assert embedder.post("/v2/models/nobody/infer", {"inputs": [column]}).status_code == 404
    assert embedder.get("/v2/models/another", **bob).status_code == 404
    for server, path in (
        (embedder, "/v1/classify"),
        (classifier, "/v1/embeddings"),
        (embedder, "/v1/completions"),
    ):
        assert server.post(path, good).status_code == 404
        assert path not in server.get("/openapi.json").json()["paths"]
    for server in (embedder, classifier):
        assert server.get("/health").json() == {"status": "ok"}
        assert "bug" not in server.log.read_text()
    assert embedder.post("/v1/embeddings", good).status_code == 200
    line = waited(lambda: [line for line in embedder.audited() if line["status"] == 200 and line["rows"]])[-1]
    assert (line["route"], line["completion_tokens"], line["outcome"]) == ("POST /v1/embeddings", 0, "stop")


def test_answers_to_token_ids_say_whose_they_have_to_be(
    embedder: Served, classifier: Served, server: Served
) -> None:
    """Nobody can tell ids of another tokenizer, as LangChain's client sends them: an answer to ids says what
    they were taken for.
    """
    for asked, path, texts, ids in (
        (embedder, "/v1/embeddings", {"input": "w1"}, {"input": [[1, 2], [3]]}),
        (classifier, "/v1/classify", {"input": ["w1"]}, {"input": [1, 2]}),
        (server, "/v1/completions", {"prompt": "x"}, {"prompt": [1, 2], "stream": False}),
    ):
        said = [
            asked.post(path, {"model": "alpha", **body}).json()["adapterpack"].get("warnings")
            for body in (texts, ids)
        ]
        assert said[0] is None
        assert "check_embedding_ctx_length=False" in said[1][0]


def test_a_route_of_another_kind_of_bundle_is_answered_by_those_that_there_are(
    embedder: Served, server: Served
) -> None:
    for asked, path, there in (
        (embedder, "/v1/chat/completions", "/v1/embeddings"),
        (server, "/v1/embeddings", "/v1/chat/completions"),
    ):
        error = asked.post(path, {"model": "alpha"}).json()["error"]
        assert error["code"] == "not_found"
        assert f"POST {there}" in error["message"] or f", {there}" in error["message"]


def test_what_a_server_does_not_begin_with(features: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An option for text; a task that no route answers."""
    with pytest.raises(ConfigError, match=r"no route of this bundle has such an option.*sampling"):
        serve(features, port=0, sampling="greedy", provider="cpu", ready=lambda served: None)
    engine = Engine(features, "cpu")
    monkeypatch.setattr(engine.bundle, "task", replace(engine.bundle.task, name="fill-mask"))
    with pytest.raises(Unsupported, match="no route answers this task"):
        apis_of(engine, ServerLimits(), {})


def test_an_offline_run_that_ended_at_a_row_goes_on(features: Path, tmp_path: Path) -> None:
    """Requests for vectors: where one cannot be answered the blocks before it are kept, and the same command
    with --keep-going goes on behind them, as a mark in what was kept shows; the bytes, to the last digit, are
    those of one run.
    """
    dice, out, session = random.Random(4), tmp_path / "out.jsonl", Session(features, "cpu")
    requests = [
        {
            "custom_id": str(number),
            "method": "POST",
            "url": "/v1/embeddings",
            "body": {"model": dice.choice(["alpha", "another"]), "input": words(dice, 20)},
        }
        for number in range(100)
    ]
    requests[80]["body"] = {"model": "nobody", "input": "w1"}
    options = (
        features,
        "--input",
        written(tmp_path / "batch.jsonl", requests),
        "--batch-size",
        2,
        "--provider",
        "cpu",
    )
    ran(*options, "--output", out, code=1)
    assert kept(out) == 2
    (rows,) = tmp_path.glob(".*.partial/rows")
    rows.write_bytes(rows.read_bytes().replace(b'"custom_id": "7"', b'"custom_id": "#"'))
    ran(*options, "--output", out, "--keep-going", code=1)
    ran(*options, "--output", tmp_path / "whole.jsonl", "--keep-going", code=1)
    assert (
        out.read_bytes().replace(b'"custom_id": "#"', b'"custom_id": "7"', 1)
        == (tmp_path / "whole.jsonl").read_bytes()
    )
    assert b'"custom_id": "#"' in out.read_bytes()
    for line, request in list(zip(out.read_text().splitlines(), requests, strict=True))[::9]:
        body, given = json.loads(line)["response"]["body"], request["body"]
        vector = session.run(session.encode([given["input"]]), given["model"])["last_hidden_state"][0].mean(0)
        np.testing.assert_allclose(
            body["data"][0]["embedding"], vector / np.linalg.norm(vector), rtol=0, atol=1e-5
        )
