"""Two processes that fork random bytes, to test an engine on this machine."""
