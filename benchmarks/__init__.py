"""What a search and an adapter cost, measured: `python -m benchmarks.NAME` from the tree's root, `--help` says more."""
