"""A bundle over HTTP: OpenAI's routes, an adapter for each request, keys, fairness, limits. Needs the extra
``serve``.
"""
