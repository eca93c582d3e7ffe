"""What MORSE costs next to the bare backbone: ``python -m benchmarks.cost``."""
