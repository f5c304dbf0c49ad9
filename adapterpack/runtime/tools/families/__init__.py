"""How models write calls, one module a family, which registers it."""
