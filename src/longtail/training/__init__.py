"""Training: the loop, its schedule, its checkpoints, and the teacher as a first stage."""
