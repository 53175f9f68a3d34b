"""What needs training, evaluation and measurement together."""
