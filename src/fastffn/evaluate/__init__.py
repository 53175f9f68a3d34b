"""Quality of models."""
