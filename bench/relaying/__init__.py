"""Processes of `bench.relay`, workers that decide nothing and clients, and their samples."""
