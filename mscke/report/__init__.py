"""Rows in, tables and figures out: a module a notebook, in their order."""
