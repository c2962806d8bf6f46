"""What of an adapter goes to the Hub."""

from .card import adapter_card, folder_card
from .push import PushAdapterCallback

__all__ = ["PushAdapterCallback", "adapter_card", "folder_card"]
