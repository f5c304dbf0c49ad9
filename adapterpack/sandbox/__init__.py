"""Runs code on untrusted bytes in separate processes with limits of memory and time, where no check could
bound its cost.
"""
