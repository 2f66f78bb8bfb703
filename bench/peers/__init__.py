"""Other engines under the same measurement, each in a process (and environment) of its own."""
