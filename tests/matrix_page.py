"""Prints which invariants each method promises, as Markdown."""

import sys

from invariants.matrix import render

from adapterpack.adapter_methods import methods

sys.stdout.write(render(methods().values()))
