"""Doors to model libraries; each file knows one."""
