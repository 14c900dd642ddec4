"""Single files to copy: each runs by itself, offline, in a few seconds on a CPU."""
