"""Prints which invariants each method promises, as Markdown."""

import sys

from ..adapter_methods import methods
from .matrix import render

sys.stdout.write(render(methods().values()))
