"""The contents of a model: tensors, Python-side state, digests. Names of vLLM's arrive as ``ModelRules``."""
