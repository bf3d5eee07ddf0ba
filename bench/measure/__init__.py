"""What `bench/bench.py` is made of: the ground to measure on, bare references, subjects, and the report."""
