"""What a server can be asked, one module a kind of question: each registers what it answers, and on which
engines.
"""
