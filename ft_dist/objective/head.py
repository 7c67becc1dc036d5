"""The output head and cross-entropy, summed over labelled tokens.

H: hidden size, V: vocabulary, T: tokens, N: tokens with a label, R: rows of new tokens.

Only rows with a label reach the head: most tokens of a chat data set are prompt, and the head is the widest
matrix product of the step. `IGNORED` labels mark the other rows.
"""

from typing import Any

import torch
import torch.nn.functional as F
from ft_dist_kernels.backend import Backend
from ft_dist_kernels.cross_entropy.op import linear_cross_entropy
from ft_dist_kernels.sizes import MAX_EXTENDED_RANK
from torch import nn

from ft_dist.data.stream.batch import IGNORED
from ft_dist.model.anatomy.logits import measured_form, own_logits
from ft_dist.model.fused.fuse import register_parameters
from ft_dist.model.fused.merged import lora_weights
from ft_dist.model.parts.new_tokens import TokenRows, token_rows

MAX_TOKEN_ROWS = MAX_EXTENDED_RANK
"""The kernel adds the rows of new tokens as an adapter of that rank, which costs a product with V x R"""


class LossHead(nn.Module):
    """Output embedding and loss. It owns no parameters: it reads those of the model's head, tied or not.

    The kernel knows logits that are a scaled and capped output of the head; others come from the model's own `forward`.
    """

    def __init__(self, causal_lm: Any, *, fused: Backend | None, zero3: bool) -> None:
        super().__init__()
        # tuples keep these from becoming submodules here, which would register their parameters under a second name
        self._causal_lm = (causal_lm,)
        self._head = (trained_head(causal_lm.get_output_embeddings()),)
        self._chosen_VR: torch.Tensor | None = None
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
        if hasattr(base, "token_adapter"):
            return "output head with LoRA and rows of new tokens"
        if type(base) is not nn.Linear:
            return f"output head of type {type(base).__name__}"
        if hasattr(head, "lora_A") and getattr(head, "lora_magnitude_vector", {}):
            return "output head with DoRA"
        count = len(head.token_ids) if hasattr(head, "token_ids") else 0
        return f"output head with {count} new tokens, over {MAX_TOKEN_ROWS}" if count > MAX_TOKEN_ROWS else None

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
        base = head.get_base_layer() if hasattr(head, "get_base_layer") else head
        weight, bias = base.weight, base.bias
        if hasattr(head, "lora_A"):
            lora = lora_weights(head)
            assert lora is not None, "training runs with one active, unmerged adapter"
            options |= {"lora_a": lora.lora_a, "lora_b": lora.lora_b, "lora_scale": lora.scale}
            if lora.dropout_p:
                options["lora_hidden"] = F.dropout(hidden, lora.dropout_p)
        elif hasattr(head, "token_ids") and (rows := token_rows(head)) is not None:
            options |= self._difference(rows, weight)
        return linear_cross_entropy(hidden, weight, labels, bias=bias, **options).loss

    def _difference(self, rows: TokenRows, weight_VH: torch.Tensor) -> dict[str, torch.Tensor]:
        """The trained rows minus the frozen ones, as an adapter whose B picks them: no copy of the head is made."""
        frozen_RH = weight_VH.detach()[rows.ids]
        if self._chosen_VR is None or self._chosen_VR.device != weight_VH.device:
            chosen_RV = F.one_hot(rows.ids, weight_VH.shape[0])
            self._chosen_VR = chosen_RV.T.to(weight_VH.dtype).contiguous()
        return {"lora_a": rows.values - frozen_RH.to(rows.values.dtype), "lora_b": self._chosen_VR}


def trained_head(head: Any) -> Any:
    """The layer that computes the logits, without peft's wrappers: the copy that trains whole, or the layer that holds
    the rows of new tokens."""
    if hasattr(head, "modules_to_save"):
        return head.modules_to_save[head.active_adapters[0]]
    return getattr(head, "token_adapter", head)
