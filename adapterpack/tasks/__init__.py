"""The tasks that models are adapted for: model class, inputs, example inputs and post-processing of each."""
