"""Maps optional libraries to the extras that install them, and turns a missing library into an error that
names the extra.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from .errors import MissingExtra

LIBRARIES = {
    "torch": "train",
    "transformers": "train",
    "accelerate": "train",
    "datasets": "train",
    "python_calamine": "train",
    "mobius": "export",
    "onnxscript": "export",
    "prometheus_client": "serve",
    "starlette": "serve",
    "uvicorn": "serve",
    "PIL": "vision",
    "cryptography": "sign",
    "sigstore": "sigstore",
    "oras": "oci",
    "gguf": "gguf",
    "llguidance": "structured",
    "sklearn": "adamss",
    "opentelemetry": "otel",
    "trl": "trl",
}
"""Maps a library to the extra that installs it."""
EXTRAS = {
    "train": "training: adapt, attach, save, train, measure",
    "export": "bundles: ONNX graphs of base models, proved against torch",
    "serve": "servers: a bundle over HTTP, a hub of your own",
    "vision": "pictures in PNG and JPEG files, for models that see",
    "sign": "signatures over packs and bundles",
    "sigstore": "signatures under an identity, without a key",
    "oci": "packs and bundles in registries of containers",
    "gguf": "models and adapters in llama.cpp's format",
    "adamss": "adapters of AdaMSS: trained, and read from PEFT's files",
    "structured": "answers by a JSON schema, a regular expression or a grammar",
    "cuda": "the CUDA libraries for ONNX Runtime",
    "otel": "traces of a server's requests",
    "trl": "training on preferences: DPO, KTO, ORPO, GRPO, reward models",
    "demo": "what the demo needs: train, export, gguf and serve",
    "ray": "examples/serving for Ray: replicas of a server, and files of rows",
}
"""What each extra is for, of those that users install."""
STAGES = {"export": "export", "bundle_for": "export", "demo": "demo"}
"""Public functions that need a larger extra than that of the first library they import."""


@contextmanager
def needed_by(what: str, extra: str | None = None) -> Iterator[None]:
    """Turns the missing library of an import into an error that names the extra to install.

    ``what`` names what needs the library, for instance ``training``; ``extra`` is the extra to install, by
    default the library's.

    Raises:
        MissingExtra: a library of an extra is not installed.

    Example:
        >>> with needed_by("signing"):  # doctest: +ELLIPSIS
        ...     raise ModuleNotFoundError("No module named 'cryptography'", name="cryptography")
        Traceback (most recent call last):
        adapterpack.errors.MissingExtra: signing needs cryptography, which is not installed. To fix it: ...
    """
    try:
        yield
    except ModuleNotFoundError as error:
        library = (error.name or "").partition(".")[0]
        if library not in LIBRARIES:
            raise
        raise MissingExtra(
            f"{what} needs {library}, which is not installed",
            remedy=f"pip install 'adapterpack[{extra or LIBRARIES[library]}]'",
        ) from error
