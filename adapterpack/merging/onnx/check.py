"""Checks a written graph with ONNX's checker and by opening it in ONNX Runtime."""

from __future__ import annotations

from pathlib import Path

from ...errors import ParityError


def check(written: Path, source: Path) -> dict[str, str]:
    """The result of both checks of ``written``: ``passed``, or why there is none because ``source`` fails as well.

    Raises:
        ParityError: it fails where the source does not.
    """
    results = {}
    for name, test in (("onnx.checker", _checker), ("onnxruntime", _runtime)):
        problem = test(written)
        if problem is not None and test(source) is None:
            raise ParityError(f"{name} does not accept the folded graph", where=written.name, found=problem, remedy="report this graph")
        results[name] = "passed" if problem is None else f"not checked: the source fails too: {problem}"
    return results


def _checker(path: Path) -> str | None:
    import onnx  # noqa: PLC0415 - only where a graph is checked

    try:
        onnx.checker.check_model(str(path))
    except Exception as error:  # the checker and its parser raise what they like
        return str(error).partition("\n")[0][:200]
    return None


def _runtime(path: Path) -> str | None:
    import onnxruntime as ort  # noqa: PLC0415 - as above

    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.add_session_config_entry("session.disable_prepacking", "1")  # no second copy of the weights
    try:
        ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime's own classes
        return str(error).partition("\n")[0][:200]
    return None
