"""What a fleet will do before it is built: formulas, event simulations, and their commands."""
