"""The parts of `scripts/benchmark.py`: how it measures, what a machine could do, what is compared, what is written."""
