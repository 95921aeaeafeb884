"""Mooncake TransferEngine behind the port."""
