"""What a model holds: tensors, Python-side state, digests. Contains no name of vLLM's."""
