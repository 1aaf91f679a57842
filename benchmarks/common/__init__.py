"""What all benchmarks share: rows, the check before the clock, timing, counting, table and plot."""
