"""Outrider: disaggregated speculative decoding over gRPC."""

__version__ = "0.1.0"
