"""What is done through the Kubernetes API: finding workers, and sizing fleets.

The only package that sees the `kubernetes` client, of which the asynchronous half is used: nothing
here blocks the event loop. It is imported only when needed, since that takes seconds.
"""
