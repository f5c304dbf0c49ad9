"""What a server measures and logs: metrics, audit log, traces, and the traffic of each key."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
