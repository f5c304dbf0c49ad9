"""Files of rows, and of requests in OpenAI's batch format, answered block by block; what was answered
outlives a killed process.
"""
