"""Tools that a model may call: how families of models write calls, how these are read, and how answers are
held to them.
"""
