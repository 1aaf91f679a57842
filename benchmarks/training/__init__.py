"""What `training_throughput.py` compares, and how it reports."""
