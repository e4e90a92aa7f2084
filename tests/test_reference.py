"""The torch twins, and the fast CPU path, against plain float64 formulas, row by row."""

import math

import pytest
import torch
from npc_kernels import cpu, reference
from npc_kernels.batch import BatchMetadata, LoraSpan, PrefillRow


@pytest.fixture(params=[reference, cpu], ids=["reference", "cpu"])
def kernels(request):
    return request.param


DTYPES = [(torch.float32, 2e-5), (torch.bfloat16, 3e-2)]


def close(got, expected, tolerance):
    torch.testing.assert_close(got.double(), expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
@pytest.mark.parametrize("shape", [(1, 8), (5, 2049), (0, 64)])
def test_rms_norm(shape, dtype, tolerance, kernels):
    x, weight = torch.randn(shape, dtype=dtype), torch.randn(shape[1], dtype=dtype)
    wide = x.double()
    expected = wide / (wide.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * weight.double()
    close(kernels.rms_norm(x, weight, 1e-5), expected, tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
def test_silu_mul(dtype, tolerance, kernels):
    x = torch.randn(3, 14, dtype=dtype)
    gate, up = x.double().split(7, dim=1)
    close(kernels.silu_mul(x), gate / (1 + (-gate).exp()) * up, tolerance)


def test_rope_rotates_pairs_by_their_angle(kernels):
    x = torch.randn(3, 2, 6)
    angles = torch.tensor([[0.0, 0.0, 0.0], [0.3, 1.0, 2.0], [3.0, 0.1, 0.5]])
    got = kernels.apply_rope(x, angles.cos(), angles.sin())
    pairs = torch.complex(x[..., :3], x[..., 3:]) * torch.polar(torch.ones(3, 1, 3), angles[:, None])
    torch.testing.assert_close(got, torch.cat((pairs.real, pairs.imag), dim=-1))


def make_batch(rows, tables, block_size, dtype):
    """Metadata of rows given as (start, stop), those of one token first, built the slow way."""
    tokens = [(row, position) for row, (start, stop) in enumerate(rows) for position in range(start, stop)]

    def slot(row, position):
        return tables[row][position // block_size] * block_size + position % block_size

    firsts = [sum(stop - start for start, stop in rows[:row]) for row in range(len(rows))]
    num_decode = sum(stop - start == 1 for start, stop in rows)
    longest = max([stop for _, stop in rows[:num_decode]], default=0)
    bias = torch.zeros(num_decode, longest, dtype=dtype)
    for row in range(num_decode):
        bias[row, rows[row][1] :] = -torch.inf
    return BatchMetadata(
        positions=torch.tensor([position for _, position in tokens]),
        kv_slots=torch.tensor([slot(row, position) for row, position in tokens]),
        num_decode=num_decode,
        decode_slots=torch.tensor(
            [[slot(row, min(p, rows[row][1] - 1)) for p in range(longest)] for row in range(num_decode)]
        ),
        decode_bias=bias,
        prefill=tuple(
            PrefillRow(
                start=firsts[row],
                stop=firsts[row] + stop - start,
                kv_slots=torch.tensor([slot(row, position) for position in range(stop)]),
                mask=torch.tensor([[seen <= position for seen in range(stop)] for position in range(start, stop)]),
            )
            for row, (start, stop) in enumerate(rows)
            if row >= num_decode
        ),
        last_tokens=torch.tensor([firsts[row] + stop - start - 1 for row, (start, stop) in enumerate(rows)]),
        lora=None,
    )


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
@pytest.mark.parametrize("rows", [[(6, 7), (2, 7), (0, 3)], [(6, 7), (4, 5), (0, 1)]], ids=["mixed", "decode"])
def test_paged_attention_is_causal_attention_of_each_row(rows, dtype, tolerance, kernels):
    """Decode, a chunk in the middle of a prompt, and a whole prompt, in one batch; NaN in blocks of nobody."""
    heads, kv_heads, size, block_size = 6, 2, 8, 4
    tables = [[3, 1], [0, 5], [2, 2]]
    batch = make_batch(rows, tables, block_size, dtype)
    k_cache = torch.zeros(7, block_size, kv_heads, size, dtype=dtype)
    v_cache = torch.zeros_like(k_cache)
    k_cache[4], v_cache[6] = float("nan"), float("nan")
    keys = {row: torch.randn(stop, kv_heads, size, dtype=dtype) for row, (_, stop) in enumerate(rows)}
    values = {row: torch.randn(stop, kv_heads, size, dtype=dtype) for row, (_, stop) in enumerate(rows)}
    for row, (start, _) in enumerate(rows):
        for position in range(start):
            slot = (tables[row][position // block_size], position % block_size)
            k_cache[slot], v_cache[slot] = keys[row][position], values[row][position]
    q = torch.randn(len(batch.positions), heads, size, dtype=dtype)
    new = [(row, position) for row, (start, stop) in enumerate(rows) for position in range(start, stop)]
    k = torch.stack([keys[row][position] for row, position in new])
    v = torch.stack([values[row][position] for row, position in new])
    kernels.write_kv(k, v, k_cache, v_cache, batch.kv_slots)
    got = kernels.paged_attention(q, k_cache, v_cache, batch)
    for token, (row, position) in enumerate(new):
        for head in range(heads):
            kv_head = head // (heads // kv_heads)
            k_row, v_row = (
                keys[row][: position + 1, kv_head].double(),
                values[row][: position + 1, kv_head].double(),
            )
            weights = torch.softmax(k_row @ q[token, head].double() / math.sqrt(size), dim=0)
            close(got[token, head], weights @ v_row, tolerance)


@pytest.mark.parametrize("num_live", [3, 12])
@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
def test_each_token_gets_its_own_adapter_and_base_tokens_none(dtype, tolerance, num_live, kernels):
    """One adapter of two pages, one of one, a token of the base, and pages that no token of the step uses."""
    span = LoraSpan(start=3, in_features=9, out_features=(7, 4))
    pages = torch.randn(num_live, span.stop + 2, dtype=dtype) * 0.2
    mask = torch.zeros(4, num_live, dtype=torch.bool)
    mask[0, 0] = mask[0, 2] = mask[1, 1] = mask[3, 0] = mask[3, 2] = True
    x, out = torch.randn(4, 9, dtype=dtype), torch.randn(4, 11, dtype=dtype)
    expected = out.double()
    for token in range(4):
        for page in mask[token].nonzero()[:, 0].tolist():
            for index, (lo, hi) in enumerate([(0, 7), (7, 11)]):
                a_start = 3 + index * 16 * 9
                b_start = 3 + 2 * 16 * 9 + index * 16 * 7
                a = pages[page, a_start : a_start + 16 * 9].view(16, 9).double()
                b = pages[page, b_start : b_start + 16 * (hi - lo)].view(16, hi - lo).double()
                expected[token, lo:hi] += (x[token].double() @ a.T) @ b
    before = out[2].clone()
    stacked = kernels.stack_pages(pages, [span])
    kernels.lora_expand(kernels.lora_shrink(x, stacked, mask, span), stacked, span, out)
    close(out, expected, 4 * tolerance)
    assert torch.equal(out[2], before)


def test_a_neighbours_nan_stays_with_the_neighbour(kernels):
    span = LoraSpan(start=0, in_features=4, out_features=(3,))
    pages = torch.randn(2, span.stop)
    pages[1, : span.b_start] = float("inf")
    out = torch.zeros(2, 3)
    mask = torch.tensor([[True, False], [False, True]])
    stacked = kernels.stack_pages(pages, [span])
    kernels.lora_expand(kernels.lora_shrink(torch.ones(2, 4), stacked, mask, span), stacked, span, out)
    assert torch.isfinite(out[0]).all()
    assert not torch.isfinite(out[1]).all()
