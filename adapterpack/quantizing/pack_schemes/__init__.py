"""The schemes that quantize packs, one module each: a scheme chooses the code of every direction of a
matrix.
"""
