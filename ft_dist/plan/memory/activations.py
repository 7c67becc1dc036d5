"""What the forward and backward passes keep, tensor by tensor, in the order in which our layers allocate and free it.

There are two forms of a block: our kernels' (`model/fused/forward.py`) and Hugging Face's. T tokens of a
micro-batch, H hidden, I intermediate, V vocabulary, n labelled rows of a loss chunk.

A block keeps for its backward pass, in elements per token, with Q and K the widths of queries and keys:

    kernels   4 H + 2 Q + 2 K + 3 I + the ranks of its adapters, and Q for the order of packed samples on CPU;
              on a GPU 2 I: backward recomputes the product of gate and up
    Hugging   4 H + 2 Q + 2 K + 4 I, and 2 H in fp32 for its norms
"""

from collections import defaultdict
from typing import Protocol

from ft_dist_kernels.sizes import TILE_ELEMENTS, chunk_rows, tile_rows

from ft_dist.plan.job import Job
from ft_dist.plan.memory.ledger import Ledger

ACTIVATIONS, LOSS, GRADIENTS = "activations", "loss", "gradients"
RECOMPUTED = "recomputed block"
OWN_BACKWARD_WIDTH = 128
"""Widest head whose attention backward is ours on a GPU (kernels/ft_dist_kernels/attention/ragged.py)"""
PROCESSORS = 132
"""Multiprocessors of an H100: other GPUs differ by about one split"""


class Walk:
    """The tensors of one micro-batch on a ledger. `gradient(numel)` is called for every gradient of a parameter."""

    def __init__(self, job: Job, ledger: Ledger) -> None:
        self.job, self.ledger = job, ledger
        self.t, self.b = job.tokens, job.item
        self.h = job.tokens * job.shape.hidden * job.item
        self.i = job.tokens * job.shape.intermediate * job.item
        self.q = job.tokens * job.shape.q_width * job.item
        self.kv = job.tokens * job.shape.kv_width * job.item
        self.lse = job.tokens * job.shape.heads * 4
        self.mask = job.rows * job.length**2
        self.part = ACTIVATIONS
        self.held: dict[int, list[str]] = defaultdict(list)
        self.norms_keep_wide = not job.fused and job.item == 2
        """Hugging Face's norms widen their input, and backward needs the widened copy"""
        widened = job.stage == 3 and self.norms_keep_wide
        widths = [width for name, _, width in job.shape.linears() if name in job.adapted_names]
        self.adapter_inputs = 4 * job.tokens * sum(widths) if widened else 0
        """Under ZeRO-3 peft's adapters stay in fp32, and peft widens x for each of them"""

    def ranks(self, *names: str) -> int:
        """Bytes of S = x A^T over those of the named matrices that carry adapters."""
        parts = sum(1 for name in names if name in self.job.adapted_names)
        return parts * self.job.config.method.adapter_rank * self.t * self.b

    def hold(self, layer: int, **tensors: float) -> None:
        for name, nbytes in tensors.items():
            if nbytes:
                self.ledger.hold(self.part, f"{layer}.{name}", nbytes)
                self.held[layer].append(name)

    def free(self, layer: int, *names: str) -> None:
        self.ledger.free(*(f"{layer}.{name}" for name in names))

    # ---- forward

    def forward_start(self) -> None:
        job, ledger = self.job, self.ledger
        ledger.hold(ACTIVATIONS, "x0", self.h)
        tables = 2 * self.t // job.rows * job.shape.head_dim * self.b * (1 if job.rows == 1 else job.rows)
        ledger.hold(ACTIVATIONS, "rotary", tables)
        if job.masked:
            ledger.hold(ACTIVATIONS, "mask", self.mask)

    def forward_block(self, layer: int) -> None:
        """From the layer's x to the next layer's; keeps everything that backward needs."""
        attention = ["self_attn.qkv_proj"] if self.job.shape.form.joined else [f"self_attn.{n}_proj" for n in "qkv"]
        gated = ["mlp.gate_up_proj"] if self.job.shape.form.joined else ["mlp.gate_proj", "mlp.up_proj"]
        self._norm(layer, "1")
        self.hold(layer, q=self.q, k=self.kv, v=self.kv, s_qkv=self.ranks(*attention))
        self._peft_spike(attention, self.q)
        self.hold(layer, q_turned=self.q, k_turned=self.kv)
        self.free(layer, "q", "k")
        if self.job.masked:
            # with a mask, SDPA needs repeated keys and values, and the mask in the dtype of the queries
            self.hold(layer, k_repeated=self.q, v_repeated=self.q, mask=self.mask * self.b)
            self.free(layer, "k_turned", "v")
        if self.job.by_segment and self.job.config.data.packs and not self.job.gpu:
            # attention keeps tokens in its own order, and the projection after it in the order of the rows
            self.hold(layer, q_spread=self.q, k_spread=self.kv, v_spread=self.kv)
            self.free(layer, "q_turned", "k_turned", "v")
            self.hold(layer, o_spread=self.q)
        self.hold(layer, o=self.q, lse=self.lse)
        self.hold(layer, s_o=self.ranks("self_attn.o_proj"), out=self.h)
        self._peft_spike(["self_attn.o_proj"], self.h)
        self.hold(layer, x_middle=self.h)
        self.free(layer, "out")
        if layer == 0 and self.job.frozen_base and not self.job.checkpointing:
            # nothing before the first adapter has a gradient
            self.ledger.free("x0", "0.rstd1", "0.wide1")
        elif self.norms_keep_wide and not self.job.checkpointing:
            self.ledger.free(f"x{layer}")
        self._norm(layer, "2")
        self.hold(layer, gate=self.i, up=self.i, s_gated=self.ranks(*gated))
        self._peft_spike(gated, self.i)
        self.hold(layer, product=self.i)
        if not self.job.fused:
            self.hold(layer, act=self.i)
        self.hold(layer, s_down=self.ranks("mlp.down_proj"), out=self.h)
        self._peft_spike(["mlp.down_proj"], self.h)
        if self.job.remakes_product:
            self.free(layer, "product")
        self.ledger.hold(ACTIVATIONS, f"x{layer + 1}", self.h)
        self.free(layer, "out")
        if self.norms_keep_wide:
            self.free(layer, "x_middle")
        self.hold(layer, x_adapters=self.adapter_inputs)

    def _norm(self, layer: int, index: str) -> None:
        extra = self.job.shape.form.block_norms // 2
        self.hold(layer, **{f"y{index}": self.h * extra, f"rstd{index}": 4 * self.t * extra})
        if self.job.fused:
            if self.job.gpu:
                return
            self.ledger.spike(ACTIVATIONS, min(3 * 4 * 128 * 1024, 3 * 4 * self.h // self.b))
            return
        wide = 4 * self.h // self.b
        if self.b == 2:
            self.hold(layer, **{f"wide{index}": wide})
        if not self.job.frozen_base:
            self.hold(layer, **{f"normed{index}": self.h})
        self.ledger.spike(ACTIVATIONS, 2 * wide)

    def _peft_spike(self, names: list[str], widest: float) -> None:
        """peft's own forward holds the update and the scaled update in addition to the layer's output."""
        if not self.job.fused and self.ranks(*names):
            self.ledger.spike(ACTIVATIONS, 2 * widest)

    def release_block(self, layer: int) -> None:
        """Checkpointing keeps only a block's input."""
        self.free(layer, *self.held.pop(layer, ()))

    # ---- loss

    def forward_end(self) -> None:
        job, wide = self.job, 4 * self.h // self.b
        self.ledger.hold(ACTIVATIONS, "y_last", self.h)
        self.ledger.hold(ACTIVATIONS, "rstd_last", 4 * self.t)
        if not job.fused:
            if self.b == 2:
                self.ledger.hold(ACTIVATIONS, "wide_last", wide)
            if not job.frozen_base:
                self.ledger.hold(ACTIVATIONS, "normed_last", self.h)

    def loss(self) -> None:
        (self._fused_loss if self.job.fused_head else self._plain_loss)()

    def _fused_loss(self) -> None:
        """Chunks of logits that become their own gradient; on CPU in fp32, with tiles of a half-precision weight and
        the gradient rounded to its dtype."""
        job, ledger = self.job, self.ledger
        n_all, v, h = round(self.t * job.labelled), job.shape.vocabulary, job.shape.hidden
        logit = self.b if job.gpu else 4
        rounded = self.b if self.b == 2 and not job.gpu else 0
        n = chunk_rows(n_all, v, gpu=job.gpu, bytes_per_logit=logit + rounded)
        ledger.hold(LOSS, "d_rows", n_all * h * self.b)
        ledger.hold(LOSS, "labels", n_all * 28)
        if job.trains_head:
            ledger.hold(LOSS, "d_head", v * h * 4)
        ledger.hold(LOSS, "logits", n * v * (logit + rounded))
        ledger.hold(LOSS, "rows", n * h * logit)
        ledger.hold(LOSS, "d_wide", n * h * 4)
        if not job.gpu:
            tile = tile_rows(v, h, cpu=True, widened_item=4 if self.b == 2 else 0)
            # logits are computed tile by tile in a separate buffer
            ledger.spike(LOSS, tile * (n * 4 + (h * 4 if self.b == 2 else 0)))
        ledger.free("logits", "rows", "d_wide")

    def _plain_loss(self) -> None:
        job, ledger = self.job, self.ledger
        n, v = round(self.t * job.labelled), job.shape.vocabulary
        if not job.frozen_base or job.stage == 3:
            ledger.hold(LOSS, "rows", n * job.shape.hidden * self.b)
        ledger.hold(LOSS, "logits", n * v * 4)
        ledger.hold(LOSS, "log_probs", n * v * 4)
        if self.b == 2:
            ledger.spike(LOSS, n * v * self.b)
        ledger.free("logits")

    def loss_backward(self) -> None:
        job, ledger = self.job, self.ledger
        v, h = job.shape.vocabulary, job.shape.hidden
        if not job.fused_head:
            n = round(self.t * job.labelled)
            ledger.hold(LOSS, "d_log_probs", n * v * 4)
            ledger.hold(LOSS, "d_logits", n * v * 4)
            ledger.free("log_probs", "d_log_probs")
            ledger.spike(LOSS, n * v * (4 + (self.b if self.b == 2 else 0)))
            ledger.free("d_logits")
            ledger.hold(LOSS, "d_rows", n * h * self.b)
            if job.trains_head:
                ledger.hold(LOSS, "d_head", v * h * self.b)
        elif job.trains_head and self.b == 2:
            ledger.hold(LOSS, "d_head_low", v * h * self.b)
            ledger.free("d_head")
            ledger.hold(GRADIENTS, "d_head", v * h * self.b)
            ledger.free("d_head_low")
        ledger.hold(ACTIVATIONS, "d_y", self.h)
        ledger.free("d_rows", "labels", "rows", "y_last")
        ledger.hold(ACTIVATIONS, "d", self.h)
        if not job.fused:
            ledger.spike(ACTIVATIONS, 3 * 4 * self.h // self.b)
        ledger.free("d_y", "rstd_last", "wide_last", "normed_last", f"x{job.shape.layers}")

    # ---- backward

    def backward_block(self, layer: int, gradient: "Gradient") -> None:
        """Frees what forward kept of the block. The upstream gradient "d" becomes that of the block's input."""
        job, names = self.job, {name.rpartition(".")[2]: (out, width) for name, out, width in self.job.shape.linears()}

        def weights(*leaves: str) -> None:
            for leaf in leaves:
                prefix = "mlp" if leaf in ("gate_proj", "up_proj", "down_proj", "gate_up_proj") else "self_attn"
                out, width = names[leaf]
                adapted = f"{prefix}.{leaf}" in job.adapted_names
                if elements := job.config.method.matrix_gradient(out, width, adapted=adapted):
                    gradient(elements)

        if job.remakes_product:
            self.hold(layer, product=self.i)
        self.hold(layer, d_product=self.i)
        weights("down_proj")
        self.free(layer, "product", "s_down")
        self.hold(layer, d_gate=self.i, d_up=self.i)
        if not job.fused:
            self.free(layer, "d_product", "up")
            self.hold(layer, d_silu=self.i)
        elif not job.gpu:
            self.ledger.spike(self.part, min(self.i, TILE_ELEMENTS * self.b))
        self.free(layer, "gate", "up", "act", "d_product", "d_silu")
        self.hold(layer, d_y2=self.h)
        weights(*(["gate_up_proj"] if job.shape.form.joined else ["gate_proj", "up_proj"]))
        self.free(layer, "d_gate", "d_up", "s_gated", "y2")
        self._norm_backward(layer, "2", "x_middle")
        self.hold(layer, d_o=self.q)
        weights("o_proj")
        self.free(layer, "s_o")
        self.hold(layer, d_q=self.q, d_k=self.kv, d_v=self.kv)
        self.ledger.spike(self.part, self._wide_heads())
        if job.masked:
            self.hold(layer, d_repeated=2 * self.q)
        self.free(layer, "q_spread", "k_spread", "v_spread", "o_spread")
        self.free(
            layer, "q_turned", "k_turned", "k_repeated", "v_repeated", "v", "o", "lse", "mask", "d_o", "d_repeated"
        )
        self.hold(layer, d_q_turned=self.q, d_k_turned=self.kv)
        self.free(layer, "d_q", "d_k")
        self.hold(layer, d_y1=self.h)
        weights(*(["qkv_proj"] if job.shape.form.joined else ["q_proj", "k_proj", "v_proj"]))
        self.free(layer, "d_q_turned", "d_k_turned", "d_v", "s_qkv", "y1")
        self._norm_backward(layer, "1", "")
        self.ledger.free(f"x{layer}", f"{layer}.x_adapters")

    def _norm_backward(self, layer: int, index: str, source: str) -> None:
        self.hold(layer, d_norm=self.h)
        if not self.job.fused:
            self.ledger.spike(self.part, 3 * 4 * self.h // self.b)
        self.free(layer, f"d_y{index}", f"rstd{index}", f"wide{index}", f"normed{index}", source)
        if not self.job.fused:
            self.ledger.spike(self.part, self.h)  # the sum of both branches of a residual connection
        self.free(layer, "d_norm")

    def _wide_heads(self) -> float:
        """Bytes of FlashAttention 2's deterministic backward pass, which handles heads too wide for ours: sums of dQ in
        fp32, one per split of the keys, and gradients of keys and values for every query head."""
        job, shape = self.job, self.job.shape
        if not (job.gpu and job.fused and job.by_segment and self.b == 2) or shape.head_dim <= OWN_BACKWARD_WIDTH:
            return 0.0
        splits = -(-PROCESSORS // (job.rows * shape.heads))
        padded = -(-shape.head_dim // 32) * 32
        return splits * (self.t + 128 * job.rows) * shape.heads * padded * 4 + 2 * self.q

    def backward_end(self) -> None:
        self.ledger.free("d", "x0", "rotary", "mask")


class Gradient(Protocol):
    """Receives the gradients of parameters: `__call__(numel)` for each."""

    def __call__(self, numel: int) -> None: ...
