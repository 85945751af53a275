"""What operations of a model have to compute and to move, and what GPUs can."""
