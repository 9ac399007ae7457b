"""Benchmarks, as ratios against a peer or a bound in the same run: `make bench`. Never a test that can fail on a slow day."""
