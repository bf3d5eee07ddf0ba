"""What runs in the monitor: a child of the master that serves metrics and health."""
