"""The page for people at ``/``: plain files without a build step, which load nothing from elsewhere and hold
no data.
"""
