"""What planner and worker share below HTTP's calls: token files, files that are re-read, connections, limits.

Knows no path and no header of the protocol. Must not import torch or vLLM.
"""
