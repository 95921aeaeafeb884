"""HTTP client and server below the protocol: connections, limits, credentials, the event loop.

Planner and worker share it. It is independent of the protocol's paths and headers.
"""
