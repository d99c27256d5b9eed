"""
Model and data set cards for the Hub.

All numbers in a card come from files that a training or `gmail-hf evaluate` wrote. No function here takes a
score.
"""

from .dataset_cards import dataset_card
from .model_cards import model_card, write_card
from .results import add_results

__all__ = ["add_results", "dataset_card", "model_card", "write_card"]
