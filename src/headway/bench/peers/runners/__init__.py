"""One small program for each engine, run in that engine's own environment: the standard library and that engine only.

They speak JSON lines with the bench (`protocol`), and are started as `python -m runners.NAME` in the folder above.
"""
