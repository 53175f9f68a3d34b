"""Conversion within a budget of quality: the fastest mixture of kinds and sizes on this machine that keeps it.

quality.py   what the model loses, on held-out text
plans.py     which FFN becomes what: the trade-off, from times and errors (no model in sight)
search.py    measures these, tries plans, and puts the best in place
report.py    what was found
"""

from fastffn.convert.budget.quality import Budget
from fastffn.convert.budget.search import convert_within

__all__ = ["Budget", "convert_within"]
