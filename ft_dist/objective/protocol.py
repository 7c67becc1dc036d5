"""What the engine needs from an objective: the loss of a micro-batch, its weight, and metrics.

To add an objective, subclass `Objective` in a new file and add a line to `table.py`.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, Protocol

import torch
from ft_dist_kernels.attention.ragged_segments import AnySegments
from ft_dist_kernels.backend import Backend
from torch import nn

from ft_dist.data.stream.batch import MicroBatch
from ft_dist.model.anatomy.decoder import block_masks, decoder_of
from ft_dist.objective.head import LossHead


class Units(Protocol):
    """Counts of a micro-batch, or of a global batch over all ranks, known on the host."""

    @property
    def labelled_tokens(self) -> int: ...

    @property
    def samples(self) -> int:
        """A group of sequences, such as a preference pair, is one sample."""
        ...


class Objective(nn.Module, ABC):
    """Wraps a causal language model, bare or with adapters; `forward(**batch.inputs())` is the summed loss.

    `fused` names the kernels that compute head and loss together, without T x V logits; None uses the model's own head
    and PyTorch's loss. `by_segment`: every attention layer can run sample by sample. The engine divides the loss and
    every metric once, by the weight of the global batch. A batch of weight 0 has loss 0 and zero gradients.
    """

    def __init__(
        self, model: nn.Module, *, fused: Backend | None = None, by_segment: bool = False, zero3: bool = False
    ) -> None:
        super().__init__()
        self.model = model
        self.by_segment = by_segment
        self.by_block_masks = False
        """Samples of a row are separated by masks that we build, because the model's ignore `position_ids`"""
        self.head = LossHead(self.causal_lm, fused=fused, zero3=zero3)

    @staticmethod
    @abstractmethod
    def weight(units: Units) -> int:
        """What the batch contributes to the divisor. Weights of micro-batches add up to that of the global batch."""

    def loss(self, batch: MicroBatch) -> torch.Tensor:
        """Summed loss of a micro-batch, fp32."""
        loss: torch.Tensor = self(**batch.inputs())
        return loss

    def metrics(self, batch: MicroBatch) -> Mapping[str, torch.Tensor]:
        """Sums to report with the loss, from the forward of `batch` that just ran.

        Every batch, dummies included, gives the same names in the same order.
        """
        return {}

    @property
    def causal_lm(self) -> Any:
        """The transformers model; adapters, if any, are inside its layers."""
        get_base_model = getattr(self.model, "get_base_model", None)
        return get_base_model() if get_base_model else self.model

    def computed_tokens(self, batch: MicroBatch) -> int:
        """Tokens that run for a batch: where attention runs sample by sample, no padding, and shared prefixes once."""
        return len(batch.kept) if self.by_segment else batch.input_ids.numel()

    def hidden(
        self,
        input_ids: torch.Tensor,
        labels: torch.Tensor,
        position_ids: torch.Tensor,
        kept: torch.Tensor | None = None,
        segments: AnySegments | None = None,
        labelled: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """(hidden states, their labels, indices of the labelled rows among them), for the head.

        input_ids, labels, position_ids: (rows, T) int64. `labels[t]` is the target of token t, already shifted;
        `position_ids` restart at every sample, which is how the attention mask separates samples. With `kept` and
        `segments` (see MicroBatch) attention can run sample by sample instead, over tokens that are not padding.
        `labelled` (N,) int64, indices into `kept`, saves the search for labels.
        """
        causal_lm = self.causal_lm
        if str(causal_lm.config._attn_implementation).startswith("flash"):
            # its variable-length form detects restarting positions in a single row only; samples of packed rows would
            # otherwise see each other
            input_ids, labels, position_ids = (rows.view(1, -1) for rows in (input_ids, labels, position_ids))
        separate: dict[str, Any] = {}
        if self.by_segment and kept is not None:
            if len(kept) == labels.numel():  # all of them, in order
                input_ids, labels, position_ids = (rows.view(1, -1) for rows in (input_ids, labels, position_ids))
            else:
                taken = (rows.view(-1)[kept][None] for rows in (input_ids, labels, position_ids))
                input_ids, labels, position_ids = taken
            # the mask is not read then; with four dimensions it keeps transformers from building one
            separate = {"segments": segments, "attention_mask": position_ids.new_empty(0, 0, 0, 0)}
        elif labelled is not None:
            assert kept is not None
            labelled = kept[labelled]
        if self.by_block_masks:
            separate = {"attention_mask": block_masks(causal_lm, position_ids)}
        decoder = decoder_of(causal_lm)
        output = decoder(input_ids=input_ids, position_ids=position_ids, use_cache=False, **separate)
        return output.last_hidden_state, labels, labelled
