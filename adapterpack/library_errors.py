"""Turns exceptions of libraries that read untrusted input into this package's errors, in one place.

Whatever such a library raises on a stranger's bytes is the fault of the bytes, and becomes a named error. Any
other exception is a bug in adapterpack and stays as it is.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from .errors import AdapterpackError, FormatError

INSIDE = "inside"
"""Stands, among what a library raises, for any exception raised in code outside of this package, Python's own
errors included.
"""
PLAIN = "plain"
"""Stands for ``Exception`` itself, without its subclasses."""

BORDERS: Mapping[str, tuple[str, ...]] = {
    "cryptography": ("cryptography", "builtins.ValueError", "builtins.TypeError", INSIDE),
    # INSIDE covers pandas and the file systems that it uses.
    "datasets": ("datasets", "pyarrow", INSIDE),
    # A template computes, so it can raise any of Python's errors.
    "jinja2": ("jinja2", INSIDE),
    # Invalid JSON, invalid UTF-8, or a number with too many digits.
    "json": ("builtins.ValueError",),
    "llguidance": ("builtins.ValueError", "pyo3_runtime.PanicException"),
    "msgspec": ("msgspec", "builtins.ValueError"),
    "numpy": (
        "builtins.ValueError",
        "builtins.EOFError",
        "builtins.OSError",
        "builtins.SyntaxError",
        "builtins.TypeError",
        "builtins.KeyError",
        "struct.error",
        "tokenize.TokenError",
        "zipfile.BadZipFile",
    ),
    "onnx": ("google.protobuf", "onnx", "builtins.ValueError", "builtins.TypeError", "builtins.RuntimeError"),
    "onnxruntime": ("onnxruntime", "builtins.ValueError", "builtins.TypeError", "builtins.RuntimeError"),
    "PIL": ("PIL", INSIDE),
    "protobuf": ("google.protobuf", "builtins.ValueError", "builtins.TypeError"),
    "sigstore": (INSIDE,),
    "safetensors": ("safetensors", "builtins.ValueError", "builtins.TypeError", "builtins.KeyError"),
    # A Rust panic, as in a regular expression, is not an Exception.
    "tokenizers": (PLAIN, "builtins.ValueError", "builtins.TypeError", "pyo3_runtime.PanicException", INSIDE),
    # Also used around rows of untrusted data, which forms take apart without checking them first.
    "transformers": (
        "transformers",
        "builtins.AttributeError",
        "builtins.LookupError",
        "builtins.TypeError",
        "builtins.ValueError",
        INSIDE,
    ),
    "wave": (
        "wave.Error",
        "builtins.EOFError",
        "builtins.ValueError",
        "builtins.RuntimeError",
        "struct.error",
    ),
    "yaml": (
        "yaml",
        "builtins.ValueError",
        "builtins.TypeError",
        "builtins.LookupError",
        "builtins.AttributeError",
        "builtins.ArithmeticError",
    ),  # besides its own, what Python says of dates, numbers and tags
}
"""Maps a library to the exceptions that it raises on unusable input: classes, or modules and packages with
all of their classes.

They are compared by name, so that nothing is imported for the comparison. Exhausted stack or memory counts
for every library.
"""

_EXHAUSTED = {
    "RecursionError": "it is nested too deeply",
    "MemoryError": "it takes more memory than there is",
}
_NO_MEMORY = (
    "out of memory",
    "can't allocate memory",
    "not enough memory",
    "bad_alloc",
    "bad allocation",
    "Failed to allocate",
)
"""Parts of the messages by which torch and ONNX Runtime alone tell that there is no more memory."""
_LONGEST = 300


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that there is no more memory.

    Example:
        >>> is_out_of_memory(RuntimeError("std::bad_alloc")), is_out_of_memory(RuntimeError("a bad shape"))
        (True, False)
    """
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or any(sign in str(error) for sign in _NO_MEMORY)
    )


@contextmanager
def library_errors(
    library: str,
    what: str,
    *,
    where: object = None,
    expected: object = None,
    remedy: str | None = None,
    kind: type[AdapterpackError] = FormatError,
) -> Iterator[None]:
    """Turns what a library of :data:`BORDERS` raises on untrusted input into ``kind``, with ``what`` and the
    library's reason.

    Put only the call of the library into the block: a bug in any other line there would be blamed on the
    input.

    Example:
        >>> with library_errors("json", "this is not JSON", where="line 3"):  # doctest: +ELLIPSIS
        ...     int("x")
        Traceback (most recent call last):
        adapterpack.errors.FormatError: this is not JSON: invalid literal for int() with base 10: 'x' (at ...
    """
    try:
        yield
    except AdapterpackError:
        raise
    except BaseException as error:
        if not _is_of(library, error):
            raise
        raise kind(f"{what}: {reason(error)}", where=where, expected=expected, remedy=remedy) from error


def reason(error: BaseException) -> str:
    """Returns the message of an exception, or of the one that it wraps, short and on one line.

    Example:
        >>> (reason(KeyError("a")), reason(ValueError()),
        ...     reason(RecursionError("maximum recursion depth exceeded")))
        ("KeyError: 'a'", 'ValueError', 'it is nested too deeply')
    """
    error = error.__cause__ or error
    name = type(error).__name__
    text = _EXHAUSTED.get(name) or " ".join(str(error)[: 4 * _LONGEST].split())[:_LONGEST].rstrip(". ")
    return f"{name}: {text}" if isinstance(error, LookupError | AttributeError) else text or name


def root_reason(error: BaseException) -> str:
    """Returns the message of the first exception in the chain that led to this one, short and on one line.

    Example:
        >>> try:
        ...     raise RuntimeError("see above") from KeyError("a")
        ... except RuntimeError as error:
        ...     root_reason(error)
        "KeyError: 'a'"
    """
    while error.__cause__ is not None:
        error = error.__cause__
    return reason(error)


def _is_of(library: str, error: BaseException) -> bool:
    """Whether an exception is among those that the library raises on unusable input."""
    names = BORDERS[library]
    if (PLAIN in names and type(error) is Exception) or (INSIDE in names and _is_inside(error)):
        return True
    classes = [f"{cls.__module__}.{cls.__qualname__}" for cls in type(error).__mro__]
    return type(error).__name__ in _EXHAUSTED or any(
        one == name or one.startswith(f"{name}.") for name in names for one in classes
    )


def _is_inside(error: BaseException) -> bool:
    """Whether an exception was raised in other packages' code; one raised in a line of this package may be
    its own bug.
    """
    frame = error.__traceback__
    while frame is not None and frame.tb_next is not None:
        frame = frame.tb_next
    where = "" if frame is None else str(frame.tb_frame.f_globals.get("__name__"))
    return isinstance(error, Exception) and where.partition(".")[0] != __name__.partition(".")[0]
