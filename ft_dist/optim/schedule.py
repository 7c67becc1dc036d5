"""Learning rates as a pure function of the step, so a resumed run needs no state."""

import math

from ft_dist.config.schema import OptimConfig


def learning_rate(optim: OptimConfig, *, step: int, total_steps: int) -> float:
    """The rate of optimizer step `step` (1-based) in a run of `total_steps`.

    Warm-up is linear from lr / warmup_steps. Cosine (Loshchilov & Hutter, arXiv 1608.03983) and linear decay to
    lr * min_lr_ratio, reached one step after the last, so that no step is wasted at a rate of 0. wsd (Hu et al., arXiv
    2404.06395) holds lr and decays linearly over the last `decay_steps`.
    """
    if step <= optim.warmup_steps:
        return optim.lr * step / optim.warmup_steps
    done = step - 1
    if optim.schedule == "constant":
        return optim.lr
    floor = optim.lr * optim.min_lr_ratio
    if optim.schedule == "wsd":
        decay_steps = optim.decay_steps if optim.decay_steps is not None else max(1, total_steps // 10)
        start = max(optim.warmup_steps, total_steps - decay_steps)
        share = min(1.0, max(0.0, (total_steps - done) / max(1, total_steps - start)))
        return floor + (optim.lr - floor) * share
    progress = min(1.0, (done - optim.warmup_steps) / max(1, total_steps - optim.warmup_steps))
    share = 0.5 * (1 + math.cos(math.pi * progress)) if optim.schedule == "cosine" else 1 - progress
    return floor + (optim.lr - floor) * share
