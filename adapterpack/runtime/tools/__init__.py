"""Tool calls: how families of models write them, how answers are parsed, and how a grammar constrains answers
to them.
"""
