"""The parts of `step_throughput.py`: models, providers, their check, the rounds, the report."""
