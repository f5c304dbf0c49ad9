"""The rules as values, by what they look at: only the family of a rule that is asked for is imported."""
