"""The paper's Table 1: its rows, the sweep that trains them, the table and the figures."""
