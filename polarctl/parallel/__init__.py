"""Several processes: started together, told apart by rank, or working ahead for one."""
