"""Every example runs, on tiny random models."""

from __future__ import annotations

from pathlib import Path

import pytest

import adapterpack

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.mark.parametrize(("config", "model"), [("tickets.yaml", "tiny_bert"), ("orders.yaml", "tiny_llama")])
def test_training_configs(
    config: str, model: str, tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``adapterpack train examples/X.yaml`` gives a valid pack; paths in it are those of the checkout's
    root.
    """
    monkeypatch.chdir(EXAMPLES.parent)
    folder = request.getfixturevalue(model)
    (pack,) = adapterpack.train(
        EXAMPLES / config,
        [f"model_name_or_path={folder}", f"output_dir={tmp_path / 'pack'}", "max_steps=2", "max_length=48"],
    )
    assert adapterpack.validate(tmp_path / "pack", folder).valid
    assert pack.manifest.training["steps"] == 2
    if config == "orders.yaml":  # what the README shows of it
        assert adapterpack.convert(pack, tmp_path / "orders.gguf", to="gguf", base=folder).notes == ()


def test_every_example_is_covered_here() -> None:
    """A new file in ``examples/`` needs a test: the configs above, the method in test_plugins, what other
    kinds of values there are, and a package with a kind of adapter, in test_extensions, the gates in
    hub/test_gates, what is for servers in serving/test_kubernetes, test_containers and test_ray, the
    demo in test_demo, and the scripts that train in test_training_examples; the cookbook in
    guide/test_cookbook.
    """
    known = {
        "tickets.yaml",
        "orders.yaml",
        "data",
        "demo",
        "ci",
        "containers",
        "cookbook",
        "serving",
        "new_peft_method.py",
        "shadow_peft",
        "training",
        *(f"new_{kind}.py" for kind in ("method", "rule", "node", "task", "codec", "frontend", "target")),
    }
    assert {path.name for path in EXAMPLES.iterdir()} - {"__pycache__"} == known
