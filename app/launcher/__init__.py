"""What `sluice up` runs: environments, checkpoints, processes, and the supervisor that keeps them."""
