"""What of an adapter goes to the Hub."""

from .card import adapter_card

__all__ = ["adapter_card"]
