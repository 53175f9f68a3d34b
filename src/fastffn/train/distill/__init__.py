"""Recovery after a conversion: the dense model teaches the converted one, FFN by FFN, then end to end."""
