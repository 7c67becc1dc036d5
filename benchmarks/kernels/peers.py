"""Other projects' kernels for the same op, if installed. All are optional."""

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F

Peer = Callable[..., Any]


def _liger(op: str) -> dict[str, Peer]:
    if find_spec("liger_kernel") is None:
        return {}
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction
    from liger_kernel.ops.geglu import LigerGELUMulFunction
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction
    from liger_kernel.ops.rope import LigerRopeFunction
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    def loss(hidden, weight, labels):
        arguments = (hidden, weight, labels, None, None, -100, 0.0, 0.0, "sum")
        return LigerFusedLinearCrossEntropyFunction.apply(*arguments)[0]

    # Liger's backward writes over its inputs: it gets copies, as a model's own activations would be.
    return {
        "linear_cross_entropy": {"Liger": loss},
        "rms_norm": {"Liger": lambda x, weight: LigerRMSNormFunction.apply(x, weight, 1e-6, 0.0, "llama", False)},
        "swiglu": {"Liger": lambda gate, up: LigerSiLUMulFunction.apply(gate.clone(), up.clone())},
        "geglu": {"Liger": lambda gate, up: LigerGELUMulFunction.apply(gate.clone(), up.clone())},
        "rope": {"Liger": lambda q, k, cos, sin: LigerRopeFunction.apply(q.clone(), k.clone(), cos, sin)},
    }.get(op, {})


def _cut_cross_entropy() -> dict[str, Peer]:
    if find_spec("cut_cross_entropy") is None:
        return {}
    from cut_cross_entropy import linear_cross_entropy

    return {"CCE": lambda hidden, weight, labels: linear_cross_entropy(hidden, weight, labels, reduction="sum")}


def _torch_linear_cross_entropy() -> dict[str, Peer]:
    fused = getattr(F, "linear_cross_entropy", None)
    if fused is None:
        return {}
    return {"torch": lambda hidden, weight, labels: fused(hidden, weight, labels, reduction="sum")}


def peers_of(op: str, eager: Peer) -> dict[str, Peer]:
    """Peers by name: on CPU only PyTorch's own fused loss, on CUDA also compiled eager, Liger and CCE."""
    peers = _torch_linear_cross_entropy() if op == "linear_cross_entropy" else {}
    if not torch.cuda.is_available():
        return peers
    if op == "linear_cross_entropy":
        peers |= _where_it_imports("CCE", _cut_cross_entropy)
    return peers | _where_it_imports("Liger", lambda: _liger(op)) | {"torch.compile": torch.compile(eager)}


def _where_it_imports(name: str, make: Callable[[], dict[str, Peer]]) -> dict[str, Peer]:
    """A peer whose version does not work with this torch loses its own figures, not ours."""
    try:
        return make()
    except Exception as problem:
        print(f"{name} does not import: {type(problem).__name__}: {problem}", flush=True)
        return {}
