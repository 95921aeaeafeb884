"""Shadows the wheel's package."""
