"""What `bench/chaos.py` is made of: tasks, clients, a stand to break things on, scenarios, and the account."""
