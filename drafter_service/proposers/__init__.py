"""Proposers: ways to guess, behind one small interface (`base.Proposer`)."""
