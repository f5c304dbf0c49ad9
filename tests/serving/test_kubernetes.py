"""The manifests in ``examples/serving/kubernetes``: every field is one of Kubernetes', and what they say of
the commands is so.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from kubernetes import client

from adapterpack.cli.commands.serve import command as serve
from adapterpack.serving.routes import ROUTES
from adapterpack.serving.tenants.limits import ServerLimits

FOLDER = Path(__file__).parents[2] / "examples" / "serving" / "kubernetes"
HAPROXY = FOLDER.parent / "haproxy.cfg"
KINDS = {
    "Service": "V1Service",
    "StatefulSet": "V1StatefulSet",
    "Deployment": "V1Deployment",
    "PodDisruptionBudget": "V1PodDisruptionBudget",
}
PREDICTOR = {"minReplicas": int, "maxReplicas": int, "scaleMetric": str, "scaleTarget": int}
"""Fields of KServe's predictor besides those of a pod: kserve 0.21, V1beta1PredictorSpec."""


def documents() -> Iterator[tuple[str, Any]]:
    for path in sorted(FOLDER.glob("*.yaml")):
        yield from ((path.name, document) for document in yaml.safe_load_all(path.read_text("utf-8")))


def require(value: Any, kind: str, where: str) -> None:
    """Checks that a value is of a type of the official client: its fields are known, of their types, and
    complete.
    """
    if match := re.fullmatch(r"[Ll]ist\[(.+)\]", kind):
        assert isinstance(value, list), where
        for place, item in enumerate(value):
            require(item, match[1], f"{where}[{place}]")
    elif match := re.fullmatch(r"[Dd]ict[(\[]str, (.+)[)\]]", kind):
        for name, item in value.items():
            assert isinstance(name, str), where
            require(item, match[1], f"{where}.{name}")
    elif kind in ("str", "int", "bool", "float"):
        assert type(value).__name__ == kind, f"{where}: {value!r} is no {kind}"
    elif kind != "object":
        model = getattr(client, kind)
        names = {key: name for name, key in model.attribute_map.items()}
        assert isinstance(value, dict), where
        assert value.keys() <= names.keys(), f"{where}: {value.keys() - names.keys()}"
        for key, item in value.items():
            require(item, model.openapi_types[names[key]], f"{where}.{key}")
        if not isinstance(value.get("valueFrom"), dict):
            model(**{names[key]: item for key, item in value.items()})  # refuses one without what is required


def test_every_field_is_known() -> None:
    """By the models of the official client; an InferenceService's predictor is a pod with a few fields
    more.
    """
    seen = set()
    for name, document in documents():
        seen.add(document["kind"])
        if document["kind"] == "InferenceService":
            assert (document["apiVersion"], document.keys()) == (
                "serving.kserve.io/v1beta1",
                {"apiVersion", "kind", "metadata", "spec"},
            )
            assert document["spec"].keys() == {"predictor"}
            predictor = dict(document["spec"]["predictor"])
            for key, kind in PREDICTOR.items():
                assert type(predictor.pop(key)) is kind
            require(predictor, "V1PodSpec", name)
            require(document["metadata"], "V1ObjectMeta", name)
        else:
            require(document, KINDS[document["kind"]], f"{name}, {document['kind']}")
    assert seen == {*KINDS, "InferenceService"}
    with pytest.raises(AssertionError, match="readynessProbe"):
        require({"containers": [{"name": "x", "readynessProbe": {}}]}, "V1PodSpec", "wrong")


def pods() -> Iterator[tuple[str, Any]]:
    for name, document in documents():
        if document["kind"] == "InferenceService":
            yield name, document["spec"]["predictor"]
        elif "template" in document["spec"]:
            yield name, document["spec"]["template"]["spec"]


def test_commands_ports_and_probes_are_the_commands_own() -> None:
    """Each command line is one that the command accepts, its port is the container's, probes ask routes that
    need no key, and a pod has longer than answers have to end.
    """
    open_paths = {route.path for route in ROUTES if route.access == "open"}
    called = []
    for _, pod in pods():
        (container,) = pod["containers"]
        called.append(container["name"])
        (port,) = container["ports"]
        for kind in ("startupProbe", "readinessProbe", "livenessProbe"):
            probe = container.get(kind)
            asked = {} if probe is None else probe.get("httpGet") or probe["tcpSocket"]
            assert asked.get("path", "/ready") in open_paths and asked.get("port", port["name"]) in (
                *port.values(),
            )
        assert pod["terminationGracePeriodSeconds"] > ServerLimits().drain_seconds
        if container["name"] != "haproxy":
            program, name, *args = container["command"]
            context = serve.make_context(name, list(args))
            assert (program, name) == ("adapterpack", "serve")
            assert (context.params["host"], context.params["port"]) == ("0.0.0.0", port["containerPort"])
            # it listens to all
            assert {variable["name"] for variable in container["env"]} >= {"ADAPTERPACK_API_KEY"}
            written = {mount["mountPath"] for mount in container["volumeMounts"] if not mount.get("readOnly")}
            assert written == {"/cache", "/tmp"}
    assert sorted(called) == ["haproxy", "kserve-container", "server"]


def test_haproxy_knows_every_replica() -> None:
    """The variables of its configuration name the stateful set's pods under their service, at the server's
    port; the address of all is HAProxy's, whose port is the configuration's.
    """
    found = {
        (document["kind"], document["metadata"]["name"]): document["spec"] for _, document in documents()
    }
    replicas = found["StatefulSet", "adapterpack"]
    service = found["Service", replicas["serviceName"]]
    (port,) = service["ports"]
    (haproxy,) = found["Deployment", "adapterpack-haproxy"]["template"]["spec"]["containers"]
    config = HAPROXY.read_text("utf-8")
    assert {one["name"]: one["value"] for one in haproxy["env"]} == {
        name: f"adapterpack-{number}.{replicas['serviceName']}:{port['port']}"
        for number, name in zip(
            range(replicas["replicas"]),
            re.findall(r"^  server \w+ \"\$\{(\w+)-", config, re.MULTILINE),
            strict=True,
        )
    }
    assert re.findall(r"^  bind .*:(\d+)", config, re.MULTILINE) == [
        str(haproxy["ports"][0]["containerPort"])
    ]
    for kind, name in (("StatefulSet", "adapterpack"), ("Deployment", "adapterpack-haproxy")):
        spec = found[kind, name]
        assert spec["selector"]["matchLabels"] == spec["template"]["metadata"]["labels"]
    assert service["selector"] == replicas["template"]["metadata"]["labels"]
    assert (
        found["Service", "adapterpack"]["selector"]
        == found["Deployment", "adapterpack-haproxy"]["template"]["metadata"]["labels"]
    )
