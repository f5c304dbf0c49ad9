"""Schedules rows from requests to the engine: admission, a fair queue, and the thread that runs the engine's
steps.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
