"""The validator's checks: one small file a group of rules, and a table of all of them in ``registry``."""
