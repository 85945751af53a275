"""The hot loop: one turn plans, launches and collects a dense batch."""
