"""The objective: cross-entropy summed over labelled tokens, to be divided once by their count in the global batch.

T: tokens of a micro-batch, H: hidden size, V: vocabulary.

Only rows with a label reach the head: in a chat data set most tokens are prompt, and the vocabulary is the widest
matrix product of the step. `IGNORED` labels mark the rest.
"""

from typing import Any

import torch
import torch.nn.functional as F
from ft_dist_kernels.attention.ragged_segments import AnySegments
from ft_dist_kernels.backend import Backend
from ft_dist_kernels.cross_entropy.op import linear_cross_entropy
from torch import nn

from ft_dist.data.stream.batch import IGNORED, MicroBatch
from ft_dist.model.fused.fuse import register_parameters
from ft_dist.model.fused.merged import lora_weights


class CausalObjective(nn.Module):
    """Wraps a causal language model (bare or with adapters) so that its forward is the summed loss.

    `fused` names the kernels that compute head and loss in one, without T x V logits; None takes the model's own head
    and PyTorch's loss. `by_segment`: all attention layers can go sample by sample. A batch without labels has loss 0
    and zero gradients.
    """

    def __init__(
        self, model: nn.Module, *, fused: Backend | None = None, by_segment: bool = False, zero3: bool = False
    ) -> None:
        super().__init__()
        self.model = model
        self.by_segment = by_segment
        self.head = LossHead(self.causal_lm, fused=fused, zero3=zero3)

    @property
    def causal_lm(self) -> Any:
        """The transformers model itself; adapters, if any, sit inside its layers."""
        get_base_model = getattr(self.model, "get_base_model", None)
        return get_base_model() if get_base_model else self.model

    def forward(
        self,
        input_ids: torch.Tensor,
        labels: torch.Tensor,
        position_ids: torch.Tensor,
        kept: torch.Tensor | None = None,
        segments: AnySegments | None = None,
        labelled: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Sum of -log p(label) over labelled tokens, fp32.

        All arguments (rows, T) int64; `labels[t]` is the target of token t, already shifted; `position_ids` restart at
        every sample, by which the attention mask keeps samples apart. With `kept` and `segments` (see MicroBatch)
        attention can go sample by sample instead, over the tokens that are not padding. `labelled` (N,) int64, of
        `kept`, spares the search for labels.
        """
        causal_lm = self.causal_lm
        if str(causal_lm.config._attn_implementation).startswith("flash"):
            # its variable-length form looks for restarting positions in a single row only, and would otherwise let
            # the samples of packed rows see each other
            input_ids, labels, position_ids = (rows.view(1, -1) for rows in (input_ids, labels, position_ids))
        apart: dict[str, Any] = {}
        if self.by_segment and kept is not None:
            if len(kept) == labels.numel():  # all of them, in order
                input_ids, labels, position_ids = (rows.view(1, -1) for rows in (input_ids, labels, position_ids))
            else:
                taken = (rows.view(-1)[kept][None] for rows in (input_ids, labels, position_ids))
                input_ids, labels, position_ids = taken
            # no mask is looked at then; one of four dimensions keeps transformers from making its own
            apart = {"segments": segments, "attention_mask": position_ids.new_empty(0, 0, 0, 0)}
        elif labelled is not None:
            assert kept is not None
            labelled = kept[labelled]
        hidden = causal_lm.get_decoder()(input_ids=input_ids, position_ids=position_ids, use_cache=False, **apart)
        return self.head(hidden.last_hidden_state, labels, labelled)

    def computed_tokens(self, batch: MicroBatch) -> int:
        """Tokens that run for a batch: where attention goes sample by sample, no padding, shared ones once."""
        return len(batch.kept) if self.by_segment else batch.input_ids.numel()

    def batch_loss(self, batch: MicroBatch) -> torch.Tensor:
        return self(**batch.inputs())


class LossHead(nn.Module):
    """Output embedding and loss. It owns no parameter: it reads those of the model's head, tied or not."""

    def __init__(self, causal_lm: Any, *, fused: Backend | None, zero3: bool) -> None:
        super().__init__()
        # in a tuple, so that the head does not become a submodule here and its parameters get no second name
        self._head = (causal_lm.get_output_embeddings(),)
        config = causal_lm.config.get_text_config()
        self.softcap = getattr(config, "final_logit_softcapping", None)
        self.logit_scale = float(getattr(config, "logit_scale", None) or 1.0)
        self.logit_scale /= float(getattr(config, "logits_scaling", None) or 1.0)
        self.fused = fused if self.reason_unfused() is None else None
        if self.fused and zero3:
            register_parameters(self, list(self._head[0].parameters()))

    def reason_unfused(self) -> str | None:
        """Why the kernel cannot compute this head, or None."""
        head = self._head[0]
        base = head.get_base_layer() if hasattr(head, "get_base_layer") else head
        if type(base) is not nn.Linear:
            return f"output head of type {type(base).__name__}"
        if hasattr(head, "lora_A") and getattr(head, "lora_magnitude_vector", {}):
            return "output head with DoRA"
        return None

    def forward(self, hidden: torch.Tensor, labels: torch.Tensor, labelled: torch.Tensor | None = None) -> torch.Tensor:
        """Summed loss of hidden (..., H) with labels (...), of which `labelled` (N,) names the rows that have one."""
        head = self._head[0]
        if self.fused is None:
            labels_T = labels.reshape(-1)
            rows_N = (labels_T != IGNORED).nonzero().view(-1) if labelled is None else labelled
            logits_NV = head(hidden.flatten(0, -2)[rows_N]).float() * self.logit_scale
            if self.softcap:
                logits_NV = torch.tanh(logits_NV / self.softcap) * self.softcap
            return F.cross_entropy(logits_NV, labels_T[rows_N], reduction="sum")
        options: dict[str, Any] = {"softcap": self.softcap, "logit_scale": self.logit_scale, "backend": self.fused}
        options["rows"] = labelled
        weight, bias = head.weight, head.bias
        if hasattr(head, "lora_A"):
            lora = lora_weights(head)
            assert lora is not None, "training runs with one active, unmerged adapter"
            weight, bias = lora.weight, lora.bias
            options |= {"lora_a": lora.lora_a, "lora_b": lora.lora_b, "lora_scale": lora.scale}
            if lora.dropout_p:
                options["lora_hidden"] = F.dropout(hidden, lora.dropout_p)
        return linear_cross_entropy(hidden, weight, labels, bias=bias, **options).loss
