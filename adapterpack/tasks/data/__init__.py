"""Rows of data for tasks: what a row may contain, the labels of rows, scores, and a report on the rows that
were read.
"""
