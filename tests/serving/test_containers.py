"""``examples/containers``: command lines, ports and paths are the commands' own, the image holds what the
build needs.
"""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from adapterpack.cli.commands.serve import command as serve
from adapterpack.cli.main import main
from adapterpack.serving.routes import ROUTES
from adapterpack.serving.tenants.limits import ServerLimits

pytestmark = pytest.mark.fast

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "examples" / "containers"


def stages() -> dict[str, list[tuple[str, str]]]:
    """The instructions of each stage of the Dockerfile; lines that go on are one."""
    text = re.sub(r"\\\n\s*", "", (FOLDER / "Dockerfile").read_text("utf-8"))
    found: dict[str, list[tuple[str, str]]] = {}
    for line in text.splitlines():
        word, _, rest = line.partition(" ")
        if word == "FROM":
            found[rest.rpartition(" ")[2]] = []
        if word.isupper():
            found[list(found)[-1]].append((word, rest))
    return found


def accepted(words: list[str]) -> dict[str, Any]:
    """What a command makes of its arguments."""
    name, *args = words
    assert name == "serve"
    return serve.make_context(name, args, parent=main.make_context("adapterpack", [name])).params


def test_the_images_run_commands_that_there_are() -> None:
    """CMD and HEALTHCHECK of both images: the port is the one that is exposed, the path needs no key, and
    root runs nothing.
    """
    for name in ("cpu", "cuda"):
        lines = stages()[name]
        given = accepted(json.loads(dict(lines)["CMD"]))
        assert (given["host"], given["port"], given["bundle"]) == ("0.0.0.0", 8000, "/bundle")
        assert [rest for word, rest in lines if word == "USER"][-1] == "1000:1000"
    assert dict(stages()["cpu"])["EXPOSE"] == "8000"
    assert re.search(r"127\.0\.0\.1:8000(/\w+)", dict(stages()["cpu"])["HEALTHCHECK"])[1] in {  # type: ignore[index]
        one.path for one in ROUTES if one.access == "open"
    }
    assert dict(stages()["cuda"])["FROM"].startswith("cpu ")


def test_the_images_hold_what_is_needed() -> None:
    """Every path that is copied is there and is not ignored; extras are those of the package; all that the
    build reads is copied.
    """
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    kept = {
        line[1:]
        for line in (FOLDER / "Dockerfile.dockerignore").read_text("utf-8").splitlines()
        if line.startswith("!")
    }
    copied = {source for word, rest in stages()["wheel"] if word == "COPY" for source in rest.split()[:-1]}
    assert copied == kept
    assert all((ROOT / source).exists() for source in copied)
    wheel = project["tool"]["hatch"]["build"]["targets"]["wheel"]
    needed = {
        *wheel["packages"],
        *wheel["force-include"],
        *wheel["sbom-files"],
        wheel["hooks"]["custom"]["path"],
        project["project"]["readme"],
        "pyproject.toml",
    }
    assert needed | set(project["project"]["license-files"]) == copied
    extras = set(
        ",".join(re.findall(r"\.whl\)\[([\w,]+)\]", (FOLDER / "Dockerfile").read_text("utf-8"))).split(",")
    )
    assert extras <= set(project["project"]["optional-dependencies"])


def test_the_services_fit_each_other() -> None:
    """Command lines are accepted, HAProxy's configuration is there and has the servers' addresses, published
    ports stay on this machine, answers have the time to end.
    """
    services = yaml.safe_load((FOLDER / "compose.yaml").read_text("utf-8"))["services"]
    for name, service in services.items():
        given = {"host": "0.0.0.0", "port": 8080} if name == "haproxy" else accepted(service["command"])
        assert given["host"] == "0.0.0.0"
        assert all(
            re.fullmatch(rf"127\.0\.0\.1:\d+:{given['port']}", port) for port in service.get("ports", ())
        ), name
        assert (service["read_only"], service["cap_drop"]) == (True, ["ALL"])
        assert int(service["stop_grace_period"].removesuffix("s")) > ServerLimits().drain_seconds
    servers = [name for name, service in services.items() if name != "haproxy" and "profiles" not in service]
    (volume,) = services["haproxy"]["volumes"]
    variables = re.findall(r"\$\{(ADAPTERPACK_SERVER_\d)-", (FOLDER / volume["source"]).read_text("utf-8"))
    addresses = services["haproxy"]["environment"]
    assert set(addresses) == set(variables)
    assert [addresses[name] for name in variables][: len(servers)] == [f"{name}:8000" for name in servers]
    assert {service["build"]["target"] for service in services.values() if "build" in service} == {
        "cpu",
        "cuda",
    }
