"""What is done with the adapters in a model: weighed, folded into its weights and taken out again, listed,
read and exchanged.
"""
