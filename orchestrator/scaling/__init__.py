"""How many replicas each fleet should have. Pure: signals, memory and time in, decisions out.

`policy.decide` is the door. What a fleet would need right now is worked out in `orchestrators`,
`verifiers` and `drafters`; `pacing` decides how fast to go there.
"""
