"""The receiver: from the lease to the last byte. Does not import torch."""
