"""That a written graph is one: ONNX's checker reads it from the disk, and ONNX Runtime opens it."""

from __future__ import annotations

from pathlib import Path

from ...errors import ParityError


def check(written: Path, source: Path) -> dict[str, str]:
    """What each of the two says of ``written``: ``passed``, or why it has no opinion because ``source`` fails it as well.

    Raises:
        ParityError: it fails where the source does not.
    """
    found = {}
    for name, test in (("onnx.checker", _checker), ("onnxruntime", _runtime)):
        problem = test(written)
        if problem is not None and test(source) is None:
            raise ParityError(f"{name} does not accept the folded graph", where=written.name, found=problem, remedy="report this graph")
        found[name] = "passed" if problem is None else f"not checked: the source fails too: {problem}"
    return found


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
