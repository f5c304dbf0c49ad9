"""Rows of data for tasks: what a row is, the labels of rows, and what became of the rows that were read."""
