"""Forward and backward passes in fewer steps and less memory, for common structures of an adapter's normal
form.
"""
