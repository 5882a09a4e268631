"""torture: bring about the hardest faults one by one, and measure what each does to everybody else."""
