"""The planner: the service that pairs receivers with seeds. Runs without torch and vLLM.

The worker side and this package share plain data only (``messages``).
"""
