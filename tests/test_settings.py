"""The user's configuration, environment variables and messages of the command line; and that
``docs/configuration.md`` lists them all.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

import adapterpack
from adapterpack.cli import settings
from adapterpack.cli.bundle_options import device_options
from adapterpack.cli.main import main
from adapterpack.io import cache_folder

pytestmark = pytest.mark.fast

ROOT = Path(adapterpack.__file__).parents[1]
PAGE = (ROOT / "docs" / "configuration.md").read_text("utf-8")


def call(*args: str) -> Result:
    return CliRunner().invoke(main, args, prog_name="adapterpack")


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The place of a configuration; what a command puts into the environment is taken out again."""
    for setting in settings.SETTINGS.values():
        monkeypatch.setenv(setting.variable, "")  # so that it is as before afterwards
        monkeypatch.delenv(setting.variable)
    monkeypatch.setenv("ADAPTERPACK_CONFIG", str(tmp_path / "config.toml"))
    return tmp_path / "config.toml"


def test_the_page_and_the_code_name_the_same_variables() -> None:
    """Each variable that the code reads or names as its own is in the table; each of the table is in the
    code.
    """
    code = "\n".join(
        path.read_text("utf-8") for path in (*ROOT.glob("adapterpack/**/*.py"), ROOT / "hatch_build.py")
    )
    read = set(re.findall(r'environ(?:\.\w+)?[\[(]f?"(\w+)"', code)) | set(
        re.findall(r'envvar="(\w+)"', code)
    )
    table = PAGE.partition("## Environment variables")[2].partition("\n## ")[0]
    listed = {
        name
        for row in re.findall(r"^\| (`.*?) \|", table, re.MULTILINE)
        for name in re.findall(r"`([A-Z_*]+)`", row)
    }
    assert len(read) > 6
    assert read | set(re.findall(r"\bADAPTERPACK_[A-Z_]+\b", code)) <= listed
    # the code makes the names, or a library of its own does
    families = {"ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED", "OTEL_*"}
    assert "ACCELERATE_USE_{engine}" in code and "OTEL_" in code
    assert {name for name in listed - families if name not in code} == set()


def test_the_page_shows_every_key(config: Path) -> None:
    """The example is one that is read, and has them all."""
    example = PAGE.partition("## The file")[2].partition("\n## ")[0]
    config.write_text(
        "\n".join(line[4:] for line in example.splitlines() if line.startswith("    ")), "utf-8"
    )
    settings.apply_config_file()
    assert (
        {setting.variable for setting in settings.SETTINGS.values() if setting.variable in os.environ}
        == {setting.variable for setting in settings.SETTINGS.values()}
        == set(re.findall(r"# ([A-Z_]+)$", example, re.MULTILINE))
    )


def test_the_option_wins_over_the_variable_and_that_over_the_file(
    config: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import click

    config.write_text(f'threads = 3\nprovider = "cpu"\ncache = "{tmp_path / "cache"}"\n', "utf-8")
    monkeypatch.setenv("ADAPTERPACK_PROVIDER", "openvino")
    settings.apply_config_file()
    assert cache_folder() == tmp_path / "cache"

    def parsed(*args: str) -> tuple[Any, Any]:
        @click.command()
        @device_options
        def command(**options: Any) -> tuple[Any, Any]:
            return options["provider"], options["threads"]

        found: tuple[Any, Any] = command.main(args, standalone_mode=False)
        return found

    assert parsed() == ("openvino", 3)
    assert parsed("--provider", "cuda", "--threads", "7") == ("cuda", 7)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ('provder = "cpu"', "did you mean 'provider'?"),
        ("threads = 0", "a number from 1 to 4096"),
        ("threads = true", "a number"),
        ("cache = 7", "expected a path"),
        ("cache = ", "not valid TOML"),
        ('a = "' + 70_000 * "x" + '"', "too large"),
        ('log = "xml"', "use a known name: json, text"),
        ("a = " + 5000 * "[", "not valid TOML"),
        ("[cache]\nhub = 1", "expected a path"),
    ],
)
def test_a_wrong_configuration_is_a_named_error(config: Path, text: str, told: str) -> None:
    """One sentence, which names the file or the variable, before the command is read; none runs with half of
    a configuration.
    """
    config.write_text(text, "utf-8")
    done = call("rules", "linear", "--json")
    assert (done.exit_code, done.stdout) == (1, "")
    assert told in done.stderr and "bug" not in done.stderr
    assert ("config.toml" in done.stderr) or ("ADAPTERPACK_LOG" in done.stderr)
    assert call("--help").exit_code == 0


def test_a_named_configuration_must_be_there(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that nobody named may be absent; an empty name is none."""
    assert "no such" in call("rules", "linear").stderr.casefold()
    monkeypatch.delenv("ADAPTERPACK_CONFIG")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(config.parent))
    assert call("rules", "linear").exit_code == 0
    assert settings.config_file() == config.parent / "adapterpack" / "config.toml"


def test_messages(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Steps by default, none with --quiet before the command or behind it, time and source with --verbose,
    one object a line as JSON.
    """
    monkeypatch.setenv("ADAPTERPACK_CACHE", str(tmp_path))
    monkeypatch.setattr(
        "adapterpack.diagnosing.onnxruntime.ask_onnxruntime",
        lambda provider=None: (None, "not asked in this test"),
    )
    assert "look at: Disk" in call("doctor").stderr.splitlines()
    assert call("doctor", "--quiet").stderr == call("-q", "doctor").stderr == ""
    loud = call("doctor", "-v").stderr.splitlines()
    assert all(re.fullmatch(r"\d\d:\d\d:\d\d (info|debug) adapterpack\.cli: .+", line) for line in loud)
    assert re.search(r"took [\d.]+ s, at most [\d.]+ [MG]B of memory$", loud[-1])
    assert call("-q", "doctor", "-v").exit_code == 2
    monkeypatch.setenv("ADAPTERPACK_LOG", "json")
    entries = [json.loads(line) for line in call("doctor").stderr.splitlines()]
    assert {"time", "level", "logger", "message"} == set(entries[0])
    assert "look at: Disk" in [entry["message"] for entry in entries]
    [failure] = [json.loads(line) for line in call("rules", "liner\x1b").stderr.splitlines()]
    assert (failure["level"], "did you mean 'linear'?" in failure["message"]) == ("error", True)
