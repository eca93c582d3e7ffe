"""What a clone can run: the demo, and what the tables of the docs are made with."""
