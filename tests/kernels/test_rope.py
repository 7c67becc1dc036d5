"""rope against fp64 truth and transformers' function; tables against transformers' ROPE_INIT_FUNCTIONS."""

import pytest
import torch
from ft_dist_kernels.rope.op import rope, rope_inv_freq, rope_merged, rope_reference, rope_tables
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kernels.parity import BACKEND_DTYPES, BACKENDS, check_parity

# batch, query heads, key heads, positions, width, rotated columns
SHAPES = [(2, 4, 2, 4, 32, 32), (2, 3, 1, 3, 20, 12), (1, 7, 7, 3, 26, 22), (1, 1, 1, 1, 2, 2), (2, 4, 2, 0, 16, 16)]


def make_inputs(shape, dtype, *, transposed=True, seed=0, shared_table=False):
    batch, q_heads, k_heads, positions, width, rotated = shape
    generator = torch.Generator().manual_seed(seed)

    def heads(count):
        if transposed:
            return torch.randn(batch, positions, count, width, generator=generator).to(dtype).transpose(1, 2)
        return torch.randn(batch, count, positions, width, generator=generator).to(dtype)

    ids = torch.randint(5000, (1 if shared_table else batch, positions), generator=generator)
    inv_freq, _ = rope_inv_freq(head_dim=rotated, rope_theta=10_000.0)
    cos, sin = rope_tables(ids, inv_freq, attention_scaling=1.1, dtype=dtype)
    return {"q": heads(q_heads), "k": heads(k_heads), "cos": cos, "sin": sin}


def check(backend, inputs):
    upstream = tuple(torch.randn(inputs[name].shape, generator=torch.Generator().manual_seed(3)) for name in ("q", "k"))
    check_parity(
        lambda **kw: rope(**kw, backend=backend),
        rope_reference,
        inputs,
        upstream=tuple(grad.to(inputs["q"].dtype).float() for grad in upstream),
        frozen=("cos", "sin"),
    )


@pytest.mark.parametrize("transposed", [True, False], ids=["positions-first", "heads-first"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("backend", "dtype"), BACKEND_DTYPES)
def test_parity(backend, dtype, shape, transposed):
    check(backend, make_inputs(shape, dtype, transposed=transposed))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("backend", "dtype"), BACKEND_DTYPES)
def test_merged_parity(backend, dtype, shape):
    batch, q_heads, k_heads, positions, width, _ = shape
    tables = {name: table for name, table in make_inputs(shape, dtype).items() if name in ("cos", "sin")}
    counts = [q_heads, k_heads, k_heads]
    qkv = torch.randn(batch, positions, sum(counts) * width, generator=torch.Generator().manual_seed(4)).to(dtype)

    def reference(qkv, cos, sin):
        parts = qkv.split([count * width for count in counts], -1)
        q, k, v = (part.unflatten(-1, (-1, width)).transpose(1, 2) for part in parts)
        return *rope_reference(q, k, cos, sin), v

    shapes = [(batch, count, positions, width) for count in counts]
    upstream = (torch.randn(shape, generator=torch.Generator().manual_seed(3)) for shape in shapes)
    check_parity(
        lambda **kw: rope_merged(**kw, heads=q_heads, kv_heads=k_heads, backend=backend),
        reference,
        {"qkv": qkv, **tables},
        upstream=tuple(grad.to(dtype).float() for grad in upstream),
        frozen=("cos", "sin"),
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_merged_results_are_adjacent_in_memory(backend):
    inputs = make_inputs((2, 4, 2, 6, 16, 16), torch.float32)
    qkv = torch.randn(2, 6, 8 * 16)
    parts = rope_merged(qkv, inputs["cos"], inputs["sin"], heads=4, kv_heads=2, backend=backend)
    assert len({part.untyped_storage().data_ptr() for part in (*parts, qkv)}) == 2
    assert all(part.stride() == (6 * 128, 16, 128, 1) for part in parts)
    with pytest.raises(ValueError, match="must be"):
        rope_merged(qkv, inputs["cos"], inputs["sin"], heads=3, kv_heads=2, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_table_for_all_and_slices_of_a_fused_projection(backend):
    inputs = make_inputs((2, 4, 2, 6, 16, 16), torch.float32, shared_table=True)
    fused = torch.randn(2, 6, 8 * 16)
    inputs["q"] = fused[..., :64].view(2, 6, 4, 16).transpose(1, 2)
    inputs["k"] = fused[..., 64:96].view(2, 6, 2, 16).transpose(1, 2)
    check(backend, inputs)


@pytest.mark.parametrize("backend", BACKENDS)
def test_tables_with_two_different_halves(backend):
    """Gradients follow the formula even if the halves of a table differ."""
    inputs = make_inputs((1, 2, 1, 4, 8, 8), torch.float32)
    check(backend, inputs | {"cos": torch.randn(1, 4, 8), "sin": torch.randn(1, 4, 8)})


@pytest.mark.parametrize("backend", BACKENDS)
def test_memory_order_follows_the_input(backend):
    for transposed in (True, False):
        inputs = make_inputs((2, 4, 2, 6, 16, 16), torch.float32, transposed=transposed)
        q, k = inputs["q"].requires_grad_(), inputs["k"].requires_grad_()
        out = rope(q, k, inputs["cos"], inputs["sin"], backend=backend)
        grads = torch.autograd.grad(out, (q, k), [torch.ones(x.shape) for x in out])
        for x, y, grad in zip((q, k), out, grads, strict=True):
            assert x.stride() == y.stride() == grad.stride()


@pytest.mark.parametrize("backend", BACKENDS)
def test_backward_twice_does_not_change_the_upstream_gradient(backend):
    inputs = make_inputs((1, 2, 1, 4, 8, 8), torch.float32)
    q, k = inputs["q"].requires_grad_(), inputs["k"].requires_grad_()
    out = rope(q, k, inputs["cos"], inputs["sin"], backend=backend)
    upstream = [torch.full_like(x, 0.3) for x in out]
    first = torch.autograd.grad(out, (q, k), upstream, retain_graph=True)
    second = torch.autograd.grad(out, (q, k), upstream)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(torch.equal(grad, torch.full_like(grad, 0.3)) for grad in upstream)


@given(
    batch=st.integers(1, 3), heads=st.integers(1, 5), groups=st.integers(1, 3), positions=st.integers(1, 20),
    half=st.integers(1, 20), rest=st.integers(0, 9), transposed=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
@settings(max_examples=20, deadline=None)
def test_any_shape(batch, heads, groups, positions, half, rest, transposed, seed):
    shape = (batch, heads * groups, heads, positions, 2 * half + rest, 2 * half)
    check("torch", make_inputs(shape, torch.float32, transposed=transposed, seed=seed))


def test_against_transformers():
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    phi3 = pytest.importorskip("transformers.models.phi3.modeling_phi3")
    for module, shape in ((llama, SHAPES[0]), (phi3, SHAPES[1])):
        inputs = make_inputs(shape, torch.float32)
        torch.testing.assert_close(rope(**inputs), module.apply_rotary_pos_emb(**inputs))


SCALINGS = {
    "default": {},
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 2.0},
    "yarn": {"factor": 8.0, "original_max_position_embeddings": 1024},
    "yarn-mscale": {
        "factor": 40.0, "original_max_position_embeddings": 512, "beta_fast": 16, "beta_slow": 2, "mscale": 1.0,
        "mscale_all_dim": 0.7, "truncate": False,
    },
    "yarn-attention": {"factor": 4.0, "original_max_position_embeddings": 1024, "attention_factor": 0.9},
    "llama3": {
        "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 1024,
    },
    "longrope": {
        "short_factor": [1.0 + 0.1 * i for i in range(16)], "long_factor": [2.0 + 0.3 * i for i in range(16)],
        "original_max_position_embeddings": 512,
    },
}  # fmt: skip


@pytest.mark.parametrize("seq_len", [None, 300, 9000])
@pytest.mark.parametrize("name", SCALINGS)
def test_tables_equal_transformers(name, seq_len):
    transformers = pytest.importorskip("transformers")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    kind, numbers = name.split("-")[0], SCALINGS[name]
    config = transformers.LlamaConfig(
        hidden_size=128,
        num_attention_heads=4,
        max_position_embeddings=2048,
        rope_parameters={"rope_type": kind, "rope_theta": 50_000.0, **numbers},
    )
    initialise = ROPE_INIT_FUNCTIONS.get(kind, LlamaRotaryEmbedding.compute_default_rope_parameters)
    expected, expected_scaling = initialise(config, device=torch.device("cpu"), seq_len=seq_len)
    inv_freq, scaling = rope_inv_freq(
        kind, head_dim=32, rope_theta=50_000.0, max_position_embeddings=2048, seq_len=seq_len, **numbers
    )
    assert torch.equal(inv_freq, expected)
    assert scaling == expected_scaling
    if seq_len is None:
        ids = torch.arange(40)[None] * 7
        tables = LlamaRotaryEmbedding(config)(torch.zeros(1, dtype=torch.bfloat16), ids)
        ours = rope_tables(ids, inv_freq, attention_scaling=scaling, dtype=torch.bfloat16)
        assert all(torch.equal(a, b) for a, b in zip(ours, tables, strict=True))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda q, k, t: rope(q, k[:, :, 1:], t, t), "same B, S, D"),
        (lambda q, k, t: rope(q, k.bfloat16(), t, t), "one of fp32"),
        (lambda q, k, t: rope(q, k, t[:, 1:], t), "must both be"),
        (lambda q, k, t: rope(q, k, t[..., :3], t[..., :3]), "even"),
        (lambda q, k, t: rope_inv_freq("ntk", head_dim=8, rope_theta=1e4), "is not one of"),
        (lambda q, k, t: rope_inv_freq("yarn", head_dim=8, rope_theta=1e4), "needs original_max"),
        (lambda q, k, t: rope_inv_freq(head_dim=9, rope_theta=1e4), "even number"),
    ],
)
def test_errors_name_the_value(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.zeros(1, 2, 4, 8), torch.zeros(1, 1, 4, 8), torch.zeros(1, 4, 8))
