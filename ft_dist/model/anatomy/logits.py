"""How a model turns the decoder's output into logits: measured by running the model's own `forward`.

Families scale their logits under many names and in both directions (`logit_scale`, `logits_scaling`,
`lm_head_multiplier`), and cap them under more. Reading names would be wrong for the next family, so the code itself
runs, on a stand-in for the decoder whose output is known. No weight is read, so it works on partitioned models, and its
numbers are fp32 whatever the model's dtype.

V: vocabulary, N: tokens.
"""

import copy
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers.modeling_outputs import BaseModelOutputWithPast

from ft_dist.model.anatomy.decoder import decoder_of


class LogitForm(NamedTuple):
    """The logits are `softcap * tanh(scale * head(x) / softcap)`, or `scale * head(x)` without softcap."""

    softcap: float | None = None
    scale: float = 1.0


def measured_form(causal_lm: Any) -> LogitForm | None:
    """How the logits follow from the output of the head, or None if they do in another way: see `own_logits`."""
    head = _name_of_child(causal_lm, causal_lm.get_output_embeddings())
    if head is None:
        return None
    # both signs, from where tanh is the identity to where it is constant
    probes_V = torch.logspace(-3, 6, -(-causal_lm.config.get_text_config().vocab_size // 2), dtype=torch.float64)
    probes_V = torch.cat([-probes_V, probes_V]).float()
    hidden = torch.ones(1, 1, 1)
    try:
        logits_V = _run(causal_lm, hidden, {head: _Probes(probes_V)}).double().flatten()
    except Exception:  # any code of any model: the form is then unknown
        return None
    return _fit(probes_V.double()[: len(logits_V)], logits_V, causal_lm.config.get_text_config())


def own_logits(causal_lm: Any, hidden: torch.Tensor) -> torch.Tensor:
    """Logits (1, N, V) that the model's own `forward` computes from the decoder's output `hidden` (1, N, H)."""
    return _run(causal_lm, hidden, {})


def _run(causal_lm: Any, hidden: torch.Tensor, replaced: dict[str, nn.Module]) -> torch.Tensor:
    """The model's `forward` with the decoder's output given, and some of its direct children replaced."""
    decoder = decoder_of(causal_lm)
    outer = next(name for name, child in causal_lm.named_children() if decoder in set(child.modules()))
    stand_in = copy.copy(causal_lm)
    decoded = _Decoded(causal_lm._modules[outer], decoder, hidden)
    vars(stand_in)["_modules"] = {**causal_lm._modules, outer: decoded, **replaced}
    ids = torch.zeros(hidden.shape[:2], dtype=torch.long, device=hidden.device)
    # the class's function: hooks of the instance (DeepSpeed's) would fetch weights that it does not read
    output = type(causal_lm).forward(stand_in, input_ids=ids, use_cache=False)
    return output.logits


class _Output(BaseModelOutputWithPast):
    """What a decoder returns; fields of special decoders are None."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)


class _Decoded(nn.Module):
    """Stands for the decoder and modules around it: returns a known output, and has the original's other attributes."""

    def __init__(self, original: nn.Module, decoder: nn.Module, hidden: torch.Tensor) -> None:
        super().__init__()
        self._original = (original, decoder)
        self._hidden = (hidden,)

    def __getattr__(self, name: str) -> Any:
        original, decoder = vars(self)["_original"]
        value = getattr(original, name)
        inside = isinstance(value, nn.Module) and decoder in set(value.modules())
        return _Decoded(value, decoder, *self._hidden) if inside else value

    def forward(self, *_: Any, **__: Any) -> _Output:
        return _Output(last_hidden_state=self._hidden[0])


class _Probes(nn.Module):
    """Stands for the head: linear in its input, whose first element multiplies all probes."""

    def __init__(self, probes_V: torch.Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(probes_V[:, None], requires_grad=False)
        self.bias = None

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden[..., :1].float() * self.weight[:, 0]


def _fit(probes_V: torch.Tensor, logits_V: torch.Tensor, config: Any) -> LogitForm | None:
    smallest, largest = probes_V.abs().argmin(), probes_V.abs().argmax()
    scale = float(logits_V[smallest] / probes_V[smallest])
    if torch.allclose(logits_V, scale * probes_V, rtol=1e-5, atol=0):
        return LogitForm(scale=_exact(scale, config))
    softcap = float(logits_V[largest].abs())
    capped_V = softcap * torch.tanh(scale * probes_V / softcap)
    if torch.allclose(logits_V, capped_V, rtol=1e-5, atol=0):
        return LogitForm(_exact(softcap, config), _exact(scale, config))
    return None


def _exact(measured: float, config: Any) -> float:
    """The config's number, or its inverse, that an fp32 measurement stands for."""
    numbers = {float(value) for value in config.to_dict().values() if type(value) in (int, float) and value}
    for number in (1.0, *sorted(numbers)):
        for exact in (number, 1 / number):
            if abs(measured - exact) <= 1e-6 * abs(exact):
                return exact
    return measured


def _name_of_child(causal_lm: Any, module: nn.Module | None) -> str | None:
    return next((name for name, child in causal_lm.named_children() if child is module), None)
