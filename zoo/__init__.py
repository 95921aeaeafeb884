"""The model zoo: one tiny random-weight model per kind of architecture, forked and held against a default load.

``python -m zoo`` makes the checkpoints, loads each model three times in processes of their own (by the default
loader, as a seed, as a fork of that seed) and compares every tensor, every plain value and every answer. It needs
vLLM for whatever platform it runs on and takes nothing from a model hub.
"""
