"""Start values out of a dense FFN and tokens that it meets: what the kinds' `from_dense` is made of.

Everything here is closed-form or a few seconds of work a layer; training a whole model comes after (`fastffn distill`).
"""
