"""Two-stage pre-training on the Hugging Face Trainer."""
