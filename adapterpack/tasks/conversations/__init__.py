"""The forms of data that language models are trained on, one a file, and the token ids that are made of
them.
"""
