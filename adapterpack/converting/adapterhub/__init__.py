"""Reads and writes the contents of folders of AdapterHub's library (``adapters``): places, methods and
heads.
"""
