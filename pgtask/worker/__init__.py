"""What runs in a worker: a synchronous process with one session, which takes, runs and finishes tasks."""
