"""Fleets: many adapters of one base that share bases at each site, with a small core of each adapter's
own.
"""
