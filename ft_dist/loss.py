"""The objective: cross-entropy summed over labelled tokens, to be divided once by their count in the global batch.

T: tokens of a micro-batch, H: hidden size, V: vocabulary.

Only rows with a label reach the head: in a chat data set most tokens are prompt, and the vocabulary is the widest
matrix product of the step. `IGNORED` labels mark the rest.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ft_dist.data.batch import MicroBatch

IGNORED = -100


class CausalObjective(nn.Module):
    """Wraps a causal language model (bare or with adapters) so that its forward is the summed loss.

    Raises nothing of its own; a batch without labels has loss 0 and zero gradients.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    @property
    def causal_lm(self) -> Any:
        """The transformers model itself; adapters, if any, sit inside its layers."""
        get_base_model = getattr(self.model, "get_base_model", None)
        return get_base_model() if get_base_model else self.model

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        """Sum of -log p(label) over labelled tokens, fp32.

        All arguments (rows, T) int64; `labels[t]` is the target of token t, already shifted; `position_ids` restart at
        every sample, by which the attention mask keeps samples apart.
        """
        causal_lm = self.causal_lm
        hidden = causal_lm.get_decoder()(input_ids=input_ids, position_ids=position_ids, use_cache=False)
        labelled = labels != IGNORED
        logits_TV = causal_lm.get_output_embeddings()(hidden.last_hidden_state[labelled])
        return summed_cross_entropy(logits_TV, labels[labelled], causal_lm.config)

    def batch_loss(self, batch: MicroBatch) -> torch.Tensor:
        return self(batch.input_ids, batch.labels, batch.position_ids)


def summed_cross_entropy(logits_TV: torch.Tensor, labels_T: torch.Tensor, config: Any) -> torch.Tensor:
    """Cross-entropy in fp32, after the model's own soft-cap of its logits (Gemma 2)."""
    logits_TV = logits_TV.float()
    softcap = getattr(config, "final_logit_softcapping", None)
    if softcap:
        logits_TV = torch.tanh(logits_TV / softcap) * softcap
    return F.cross_entropy(logits_TV, labels_T, reduction="sum")
