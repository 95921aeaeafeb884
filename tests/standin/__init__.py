"""The host stand-in for the Ascend data plane, and the unmodified YuanRong wheels that run on it (docs/standin.md)."""
