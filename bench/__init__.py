"""Benchmark programs. Each prints what it measured, ends with a `result:` line and writes JSON."""
