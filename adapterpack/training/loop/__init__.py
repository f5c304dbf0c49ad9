"""The run of a training: what is prepared, the trainer and its hooks, each step, and what a run that was
interrupted goes on from.
"""
