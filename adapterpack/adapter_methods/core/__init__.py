"""The building blocks of every adapter method: the :class:`~.base.Method` value, the normal form, structured
matrices and the layouts of layers.
"""
