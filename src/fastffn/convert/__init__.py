"""Putting FFN kinds into models that exist, taking them out again, and keeping them on disk."""
