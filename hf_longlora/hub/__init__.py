"""Adapters on the Hub (cards, pushes), and exported for programs without this package."""

from .card import adapter_card, folder_card, refresh_card
from .export import export_adapter
from .original import import_original
from .push import PushAdapterCallback

__all__ = [
    "PushAdapterCallback",
    "adapter_card",
    "export_adapter",
    "folder_card",
    "import_original",
    "refresh_card",
]
