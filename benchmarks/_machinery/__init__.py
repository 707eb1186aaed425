"""How it is measured: ceilings, traces, comparison of records, and what several cases share."""
