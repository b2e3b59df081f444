"""Adapters for host libraries. Each module imports its host only when it is itself imported."""
