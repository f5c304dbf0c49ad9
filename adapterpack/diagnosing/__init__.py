"""What ``adapterpack doctor`` looks at: the installation, the machine, and what adapterpack keeps on it.

``check`` is what a check is, ``checks`` are the checks, a file each, ``pipeline`` runs them,
``start_provider`` and ``caches`` are what two of them do at length.
"""
