"""The tests. Shared fixtures live in `tests.fixtures`, one module by theme."""
