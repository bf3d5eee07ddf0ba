"""What runs in the master: one process, one thread, one loop; a poller for each table."""
