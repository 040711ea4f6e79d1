"""transformers' own common tests, run over every row of the catalogue: `make conformance`, `make conformance-full`.

They are not part of the installed transformers: `fetch.py` takes them from the source distribution of the same version.
"""
