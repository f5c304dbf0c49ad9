"""Finds the array library (numpy or torch) that given arrays belong to."""

from __future__ import annotations

from typing import Any

import numpy as np


def array_namespace(*arrays: Any) -> Any:
    """The array API of the library that ``arrays`` are of.

    numpy's is numpy itself, which follows the standard since 2.1: array-api-compat's wrapper of it would
    import all of numpy, with ``numpy.f2py`` and ``numpy.testing``, and take a tenth of a second of every
    command.

    Raises:
        TypeError: they are of several libraries, or of none.

    Example:
        >>> array_namespace(np.ones(2)).__name__
        'numpy'
    """
    if arrays and all(isinstance(array, np.ndarray) for array in arrays):
        return np
    import array_api_compat  # noqa: PLC0415 - only where there are others

    return array_api_compat.array_namespace(*arrays)
