"""Result folders: what a measurement leaves behind, and what may be claimed from it."""
