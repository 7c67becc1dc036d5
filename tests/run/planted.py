"""One rank of a run with a fault planted in the product: `python planted.py FAULT CONFIG [key=value ...]`."""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any


def leaking_mask() -> None:
    import torch.nn.functional as F

    import ft_dist.model.fused.forward as forward

    def whole_row(q: Any, k: Any, v: Any, segments: Any, **_: Any) -> Any:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)

    forward.segment_attention = whole_row


def halved_logits() -> None:
    import ft_dist.objective.head as head
    from ft_dist.model.anatomy.logits import LogitForm

    head.measured_form = lambda causal_lm: LogitForm(scale=0.5)


def wrong_norm() -> None:
    import ft_dist.model.fused.fuse as fuse
    from ft_dist.model.anatomy.probe import NormForm

    fuse.norm_form = lambda module, *, eps: NormForm(1.0, cast_before_weight=False)


def frozen_adapter() -> None:
    from ft_dist.method.lora import Lora

    adapt = Lora.adapt

    def freezing(*arguments: Any, **options: Any) -> Any:
        model = adapt(*arguments, **options)
        next(p for name, p in model.named_parameters() if "lora_B" in name).requires_grad_(False)
        return model

    Lora.adapt = freezing  # type: ignore[method-assign]


def unread_adapter() -> None:
    from ft_dist_kernels.lora.op import LoraWeights

    import ft_dist.model.fused.merged as merged

    original = merged.lora_weights

    def detached(layer: Any) -> LoraWeights | None:
        weights = original(layer)
        return weights._replace(lora_b=weights.lora_b.detach()) if weights else None

    for module in ("merged", "forward"):
        __import__(f"ft_dist.model.fused.{module}")
        sys.modules[f"ft_dist.model.fused.{module}"].lora_weights = detached  # type: ignore[attr-defined]


def counting_buffer() -> None:
    import torch

    from ft_dist.method.lora import Lora

    adapt = Lora.adapt

    def count(module: Any, _: Any, output: Any) -> None:
        if module.training:
            module.seen.add_(1)

    def counting(*arguments: Any, **options: Any) -> Any:
        model = adapt(*arguments, **options)
        norm = model.get_base_model().model.norm
        norm.register_buffer("seen", torch.zeros(1))
        norm.register_forward_hook(count)
        return model

    Lora.adapt = counting  # type: ignore[method-assign]


def nothing() -> None:
    pass


def eager() -> None:
    import ft_dist.model.load as load

    load.attention_implementation = lambda model: "eager"


def no_memory() -> None:
    _fail_on_rank_0(MemoryError())


def no_shared_memory() -> None:
    class OutOfResources(Exception):  # noqa: N818
        """As Triton's, which derive from Exception alone"""

    _fail_on_rank_0(OutOfResources("out of resource: shared memory, Required: 300000, Hardware limit: 232448"))


def full_memory_during_the_write() -> None:
    import ft_dist.run.proof.final as final

    folder = Path(next(each for each in sys.argv if each.startswith("output_dir=")).partition("=")[2])
    final.fits = lambda nbytes: "no memory is left" if list(folder.glob(".final*")) else None


def _fail_on_rank_0(error: Exception) -> None:
    import ft_dist.run.proof.self_check as self_check

    def fail(*_: Any) -> Any:
        assert os.environ["RANK"] == "0"
        raise error

    self_check._measure = fail


FAULTS: dict[str, Callable[[], None]] = {
    fault.__name__: fault
    for fault in (
        leaking_mask,
        halved_logits,
        wrong_norm,
        frozen_adapter,
        unread_adapter,
        counting_buffer,
        nothing,
        eager,
        no_memory,
        no_shared_memory,
        full_memory_during_the_write,
    )
}

if __name__ == "__main__":
    from ft_dist.train import main

    FAULTS[sys.argv[1]]()
    sys.exit(main(sys.argv[2:]))
