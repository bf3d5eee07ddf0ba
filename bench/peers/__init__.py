"""Other queues at the same work: `race.py` is the benchmark's subject, every other module a peer's own program."""
