"""What of an adapter goes to the Hub, and to programs without this package."""

from .card import adapter_card
from .export import export_adapter

__all__ = ["adapter_card", "export_adapter"]
