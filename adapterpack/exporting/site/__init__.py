"""A bundle as a folder of plain files that browsers run: data files that they can keep, facts that they need,
and a page.
"""
