"""One call of ``load_model``: fork or load from storage, then hand a snapshot to ``seeding``."""
