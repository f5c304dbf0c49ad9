"""Rows of data for tasks: what a row may contain, the labels of rows, scores, and a report on the rows that
were read.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
