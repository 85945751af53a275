"""The serving loop in simulated time: the scheduler is the real one, steps are predicted."""
