"""
Cards for what goes to the Hub, from what was made and measured and nothing else.

No function here takes a score: a card's numbers come from the files that a training and
`examples/evaluate_gmail.py` leave.
"""

from .dataset_cards import dataset_card
from .model_cards import model_card, write_card
from .results import add_results

__all__ = ["add_results", "dataset_card", "model_card", "write_card"]
