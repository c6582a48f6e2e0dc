"""Commands around the compiler and the runtime; each also runs as a script, `python tools/compare.py`."""
