"""Work on bytes of strangers that no check can bound, in processes of its own with limits of memory and
time.
"""
