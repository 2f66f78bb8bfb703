"""The orchestrator: front doors, placement, relaying. Loads no model."""
