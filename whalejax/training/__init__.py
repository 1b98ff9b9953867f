"""Training: loss, optimiser, step, checkpoints, metrics, and the run that joins them."""
