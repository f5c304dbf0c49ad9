"""The merge of a checkpoint in stages: plan, layout, jobs on a few workers, journal and report."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
