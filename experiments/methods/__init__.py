"""One module a method: its options, the rows of its table, the run of one case, targets and figures."""
