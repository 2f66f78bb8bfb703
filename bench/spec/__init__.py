"""Spec-Bench against a running Outrider, and the peers beside it; started by `bench.spec_bench`."""
