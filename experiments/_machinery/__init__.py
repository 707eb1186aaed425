"""What every experiment runs on, whatever its task: options, cases, the loop, checkpoints, records, the report."""
