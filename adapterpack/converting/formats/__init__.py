"""Adapter formats; each module here registers one."""
