"""What is measured: `run(options)` of each module yields one benchmark's records; an underscore marks a part of one."""
