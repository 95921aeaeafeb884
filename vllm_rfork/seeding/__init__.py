"""The seed: from the snapshot of a loaded model to its withdrawal. Does not import torch."""
