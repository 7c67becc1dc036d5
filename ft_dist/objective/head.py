"""The output head and cross-entropy, summed over labelled tokens.

H: hidden size, V: vocabulary, T: tokens, N: tokens with a label.

Only rows with a label reach the head: most tokens of a chat data set are prompt, and the head is the widest
matrix product of the step. `IGNORED` labels mark the other rows.
"""

from typing import Any

import torch
import torch.nn.functional as F
from ft_dist_kernels.backend import Backend
from ft_dist_kernels.cross_entropy.op import linear_cross_entropy
from torch import nn

from ft_dist.data.stream.batch import IGNORED
from ft_dist.model.anatomy.logits import measured_form, own_logits
from ft_dist.model.fused.fuse import register_parameters
from ft_dist.model.fused.merged import lora_weights


class LossHead(nn.Module):
    """Output embedding and loss. It owns no parameters: it reads those of the model's head, tied or not.

    The kernel knows logits that are a scaled and capped output of the head; others come from the model's own `forward`.
    """

    def __init__(self, causal_lm: Any, *, fused: Backend | None, zero3: bool) -> None:
        super().__init__()
        # tuples keep these from becoming submodules here, which would register their parameters under a second name
        self._causal_lm = (causal_lm,)
        self._head = (causal_lm.get_output_embeddings(),)
        self.form = measured_form(causal_lm)
        self.fused = fused if self.reason_unfused() is None else None
        if self.fused and zero3:
            register_parameters(self, list(self._head[0].parameters()))

    def reason_unfused(self) -> str | None:
        """Why the kernel cannot compute this head, or None."""
        head = self._head[0]
        if self.form is None:
            return "logits that the model computes in a form of its own"
        base = head.get_base_layer() if hasattr(head, "get_base_layer") else head
        if type(base) is not nn.Linear:
            return f"output head of type {type(base).__name__}"
        if hasattr(head, "lora_A") and getattr(head, "lora_magnitude_vector", {}):
            return "output head with DoRA"
        return None

    def forward(self, hidden: torch.Tensor, labels: torch.Tensor, labelled: torch.Tensor | None = None) -> torch.Tensor:
        """Summed loss of hidden (..., H) with labels (...); `labelled` (N,) are the indices of rows with a label."""
        head = self._head[0]
        if self.fused is None or self.form is None:
            labels_T = labels.reshape(-1)
            rows_N = (labels_T != IGNORED).nonzero().view(-1) if labelled is None else labelled
            logits_NV = own_logits(self._causal_lm[0], hidden.flatten(0, -2)[None, rows_N])[0].float()
            return F.cross_entropy(logits_NV, labels_T[rows_N], reduction="sum")
        options: dict[str, Any] = {"softcap": self.form.softcap, "logit_scale": self.form.scale, "backend": self.fused}
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
