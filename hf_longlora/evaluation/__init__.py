"""Does the longer context help? Perplexity by length and by position, passkey retrieval, RULER, and plots.

Everything here works on any causal language model of transformers, wrapped by PEFT or not, and measures the model as
it stands: to evaluate with the training-time attention, put the call inside `s2_attention_mode(model, "s2")`.
"""

from .compare import compare_attention
from .long_ppl import long_perplexity
from .perplexity import far_context, loss_by_position, perplexity_by_length
from .plots import plot_perplexity, plot_positions, plot_retrieval
from .retrieval import multi_needle_accuracy, multi_needle_example, passkey_accuracy, passkey_example
from .ruler import ruler_accuracy

__all__ = [
    "compare_attention",
    "far_context",
    "long_perplexity",
    "loss_by_position",
    "multi_needle_accuracy",
    "multi_needle_example",
    "passkey_accuracy",
    "passkey_example",
    "perplexity_by_length",
    "plot_perplexity",
    "plot_positions",
    "plot_retrieval",
    "ruler_accuracy",
]
