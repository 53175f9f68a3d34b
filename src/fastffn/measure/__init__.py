"""The measuring floor: is it right (gate), how fast is it (timer), how fast could it be (flops, machine)."""
