"""Distillation: a small drafter for one target, trained on what the target itself writes.

In the order of work: `openings` (what conversations begin with), `generation` (the target writes
them), `corpus` (where they are kept), `student` (the small model), `batches` and `training`,
`folder` (the result), `evaluation` (how often it agrees). `stages` puts them together, `drafting`
runs what came out.
"""
