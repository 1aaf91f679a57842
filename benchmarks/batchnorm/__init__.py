"""The parts of `batchnorm_cost.py`: networks, what a pass keeps and runs, rounds, the report."""
