"""What the folders of AdapterHub's library (``adapters``) hold: where its adapters lie, what they compute,
and their heads.
"""
