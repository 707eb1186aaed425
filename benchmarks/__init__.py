"""Measurements of jaxlib_methods beside its peers; run from a checkout: `python -m benchmarks list`."""
