"""Small mutations that re-create publicly reported bugs. Each counts its activations."""
