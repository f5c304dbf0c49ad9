"""The tasks that models are adapted for, one file per task: model class, graphs, inputs, answers and training
data, without torch.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
