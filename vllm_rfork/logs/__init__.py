"""Logging of workers, and text from outside made safe for logs."""
