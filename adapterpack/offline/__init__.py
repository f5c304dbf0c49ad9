"""Answers files of rows, and of requests in OpenAI's batch format, block by block; a job that was killed
resumes after its last block.
"""
