"""The command line: one short module for each command, which calls the library function of the same name."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
