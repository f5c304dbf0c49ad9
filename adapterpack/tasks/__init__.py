"""The tasks that models are adapted for, one file per task: model class, graphs, inputs, answers and training
data, without torch.
"""
