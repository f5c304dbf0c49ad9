"""Checks that the installed ONNX Runtime can read a graph, before anything large is written."""

from __future__ import annotations

import re

import onnx_ir as ir
import onnxruntime as ort

from ..errors import Unsupported

_LARGEST = 2**31 - 1
"""The largest size of a protobuf message in bytes."""
_INLINE = 1024
"""Initializers up to this many bytes are stored in the message."""


def require_readable(model: ir.Model) -> None:
    """Opens a one-node model with the same IR version and operator sets, and adds up the size of the protobuf
    message.

    Raises:
        Unsupported: the installed ONNX Runtime does not know these versions, or the message would be too
            large to write.
    """
    reason = _refusal(model.ir_version, dict(model.opset_imports))
    if reason is not None:
        versions = f"IR version {model.ir_version}, " + ", ".join(
            f"{domain or 'ai.onnx'} {version}" for domain, version in sorted(model.opset_imports.items())
        )
        limit = re.search(r"(?:is till opset|max supported)[^0-9]*([0-9]+)", reason)
        raise Unsupported(
            "the installed ONNX Runtime cannot read this graph",
            where=f"onnxruntime {ort.__version__}",
            found=versions,
            expected=f"at most {limit.group(1)}" if limit else reason[:200],
            remedy="install a newer onnxruntime, or choose another --frontend",
        )
    inline_bytes = sum(
        value.const_value.nbytes
        for value in model.graph.initializers.values()
        if value.const_value is not None and value.const_value.nbytes <= _INLINE
    )
    inline_bytes += sum(
        attribute.value.nbytes
        for node in model.graph
        for attribute in node.attributes.values()
        if attribute.type == ir.AttributeType.TENSOR
    )
    if inline_bytes > _LARGEST:
        raise Unsupported(
            "the graph holds too much in its constants to be one file",
            found=f"{inline_bytes} bytes",
            expected=f"at most {_LARGEST}",
            remedy="export it with its constants as initializers",
        )


def _refusal(version: int, imports: dict[str, int]) -> str | None:
    """Returns why ONNX Runtime does not open an empty model of these versions, or None."""
    x = ir.Value(name="x", shape=ir.Shape([1]), type=ir.TensorType(ir.DataType.FLOAT))
    node = ir.node("Identity", [x])
    y = node.outputs[0]
    y.name, y.shape, y.type = "y", ir.Shape([1]), x.type
    probe = ir.Model(
        ir.Graph([x], [y], nodes=[node], opset_imports={"": 17, **imports}, name="probe"), ir_version=version
    )
    options = ort.SessionOptions()
    options.log_severity_level = 4
    try:
        ort.InferenceSession(
            ir.to_proto(probe).SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
    except Exception as error:  # ONNX Runtime raises its own exception classes
        return str(error).partition("\n")[0]
    return None
