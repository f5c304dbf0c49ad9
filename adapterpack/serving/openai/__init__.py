"""OpenAI's API: the structs of requests, responses, streams and errors, and their conversion to and from the
engine.
"""
