"""Asks what runs a pack (a server, a merged checkpoint) the pack's canary, and judges by the answers alone
whether the adapter acts there as it did when it was made.
"""
