"""The planner: the service that pairs receivers with seeds.

Runs without torch and vLLM. Must not import the worker side (clients, loader, engines, seed service); the two
meet in ``messages``.
"""
