"""What a layer is: one transformer body, one short file per family, weights by name."""
