"""What only the GPU kernels have, in Triton's interpreter: segments, pages, planes, codes, DoRA."""

import dataclasses
import itertools

import pytest
import torch
from npc_kernels import gpu, lora, quant, reference
from npc_kernels.batch import BatchMetadata, LoraBatch, LoraSpan
from npc_kernels.gemm import Activations, base_split
from npc_kernels.gpu_plan import CHUNK, PLANES, plan, plan_segments, plan_tiles
from npc_kernels.quant import concatenate, dequantize, pack_int4, quantize_int4, quantize_int8
from npc_kernels.reference import HeadNorms

from npc_runtime.engine.model import ModelShape, PageLayout

BLOCK_SIZE = 16
TABLE = torch.zeros(1024, 4)


def make_batch(rows, pages=None, pool=None, multipliers=None, sampled=None):
    """Rows as (start, stop), each in KV blocks of its own."""
    starts = [0, *itertools.accumulate(stop - start for start, stop in rows)]
    room = max((-(-stop // BLOCK_SIZE) for _, stop in rows), default=1)
    tables = torch.arange(len(rows) * room).view(len(rows), room)
    places = [(row, position) for row, (start, stop) in enumerate(rows) for position in range(start, stop)]
    slots = [int(tables[row, p // BLOCK_SIZE]) * BLOCK_SIZE + p % BLOCK_SIZE for row, p in places]
    count = len(places)
    return BatchMetadata(
        token_ids=torch.arange(count) % 7,
        sampled=torch.tensor(starts[1:], dtype=torch.long) - 1 if sampled is None else sampled,
        positions=torch.tensor([position for _, position in places], dtype=torch.long),
        kv_slots=torch.tensor(slots, dtype=torch.long),
        num_decode=sum(stop - start == 1 for start, stop in rows),
        row_starts=tuple(starts),
        block_tables=tables,
        block_size=BLOCK_SIZE,
        max_seen=max((stop for _, stop in rows), default=0),
        lora=None if pool is None else LoraBatch(pool, tuple(pages), multipliers),
    )


def decode(num_rows):
    return [(5, 6)] * num_rows


# -- the plan --------------------------------------------------------------------------------------------------


def test_the_example_of_the_docstring():
    batch = make_batch([(5, 6), (0, 3)], [(5,), (2, 7)], torch.zeros(8, 1))
    planned = plan(batch, TABLE, TABLE)
    assert planned.step.tokens.tolist() == [[1, 2, 3, *[-1] * 13], [0, *[-1] * 15]]
    assert planned.step.pages.tolist() == [[2, 7, -1, -1], [5, -1, -1, -1]]
    assert planned.step.tiles.tolist() == [[0, 0, 1], [1, 1, 3]]
    assert planned.num_planes == 1


def test_rows_with_the_same_adapter_share_segments():
    batch = make_batch([*decode(20), (0, 13)], [(3,)] * 17 + [()] * 3 + [(3,)], torch.zeros(8, 1))
    segments = plan_segments(batch)
    assert [(len(segment.tokens), segment.pages) for segment in segments] == [(3, ()), (16, (3,)), (14, (3,))]
    assert sorted(token for segment in segments for token in segment.tokens) == list(range(33))


def test_tiles_are_consecutive_tokens_of_one_row():
    assert plan_tiles(make_batch([(5, 6), (0, 5)]), 2) == [(0, 0, 1), (1, 1, 2), (1, 3, 2), (1, 5, 1)]


@pytest.mark.parametrize(("ranks", "room"), [((), 0), ((1,), 1), ((1, 2), 4), ((4,), 4), ((1, 5), 8)])
def test_a_step_has_room_for_its_longest_adapter(ranks, room):
    pages = [tuple(range(rank)) for rank in ranks] or [()]
    batch = make_batch(decode(len(pages)), pages, torch.zeros(9, 1) if ranks else None)
    assert plan(batch, TABLE, TABLE).max_pages == room


# -- adapters --------------------------------------------------------------------------------------------------

PAGES = {
    "all base": [()] * 5,
    "one of one page": [(2,), (), (), (), ()],
    "all distinct": [(0,), (1,), (2,), (3,), (4,)],
    "rank 8, 16, 24 and 64": [(6,), (0,), (3, 1), (7, 2, 5, 4), ()],
    "shared, and a page used again": [(3, 1), (3, 1), (1,), (), (1,)],
}
ROWS = [(9, 10), (2, 3), (0, 1), (0, 18), (4, 9)]
SPANS = [LoraSpan(5, 2049, (33,)), LoraSpan(0, 40, (24, 8, 8)), LoraSpan(3, 7, (130, 130))]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 3e-2)])
@pytest.mark.parametrize("span", SPANS, ids=lambda span: f"{span.in_features}-{span.out_features}")
@pytest.mark.parametrize("pages", PAGES.values(), ids=PAGES)
def test_shrink_and_expand_equal_their_twins(pages, span, dtype, tolerance):
    torch.manual_seed(0)
    pool = torch.randn(8, span.stop + 3, dtype=dtype) / 8
    pool[6, span.start :].view(-1)[: 16 * span.in_features].view(16, -1)[8:] = 0  # rank 8: a zero tail
    batch = make_batch(ROWS, pages, pool)
    x = torch.randn(len(batch.positions), span.in_features, dtype=dtype) / span.in_features**0.5
    out = torch.randn(len(batch.positions), sum(span.out_features), dtype=dtype)
    expected = out.double()
    if batch.lora.live:
        wide = LoraBatch(pool.double(), batch.lora.pages)
        shrunk = reference.lora_shrink(x.double(), wide, wide.mask(batch.row_starts), span)
        reference.lora_expand(shrunk, wide, span, expected)
    planned = plan(batch, TABLE, TABLE)
    lora.expand(lora.shrink(x, planned, span), span, out)
    torch.testing.assert_close(out.double(), expected, atol=tolerance, rtol=tolerance)


def test_rows_read_their_own_pages_only():
    """Rank 64, rank 16 and no rank in one batch; pages of nobody are NaN, and so is what lies beside the group."""
    torch.manual_seed(0)
    span = LoraSpan(4, 48, (20, 12))
    pool = torch.full((9, span.stop + 6), torch.nan)
    for page in (1, 2, 4, 7, 8):
        pool[page, span.start : span.stop] = torch.randn(span.stop - span.start)
    batch = make_batch(decode(3), [(8, 1, 4, 2), (), (7,)], pool)
    out = torch.zeros(3, 32)
    lora.expand(lora.shrink(torch.randn(3, 48), plan(batch, TABLE, TABLE), span), span, out)
    assert torch.isfinite(out).all()
    assert not out[1].any()
    assert (out[[0, 2]] != 0).all()


@pytest.mark.parametrize("kernels", [reference, gpu], ids=["reference", "gpu"])
def test_dora_multiplies_base_and_adapter_but_not_the_bias(kernels):
    torch.manual_seed(0)
    span = LoraSpan(2, 24, (40, 16, 16), first_output=11)
    pool, multipliers = torch.randn(5, span.stop), torch.rand(5, 90) + 0.5
    pages = [(3, 1), (), (2,)]
    batch = make_batch([(4, 5), (3, 4), (0, 3)], pages, pool, multipliers)
    x, base, bias = torch.randn(5, 24), torch.randn(72, 24), torch.randn(72)
    expected = x.double() @ base.double().T
    wide = LoraBatch(pool.double(), tuple(pages))
    reference.lora_expand(
        reference.lora_shrink(x.double(), wide, wide.mask(batch.row_starts), span), wide, span, expected
    )
    expected[0] *= multipliers[3, 11:83]
    expected[2:] *= multipliers[2, 11:83]
    expected += bias
    planned = kernels.plan(batch, torch.ones(16, 4), torch.zeros(16, 4))
    keys, values = torch.zeros(2, 4, BLOCK_SIZE, 2, 8)
    product = kernels.project(kernels.Linear(base, bias), x, planned, span)
    q = kernels.finish_qkv(product, keys, values, planned, span, HeadNorms(None, None, 1e-5), rotates=False)
    found = [part.reshape(5, -1) for part in (q, *(cache.flatten(0, 1)[batch.kv_slots] for cache in (keys, values)))]
    torch.testing.assert_close(torch.cat(found, 1).double(), expected, atol=2e-4, rtol=1e-4)


def test_no_layer_needs_kernels_of_its_own():
    """Or a model of 28 layers would compile every kernel 28 times."""
    shape = ModelShape(28, 96, 160, 6, 2, 16, 100, 64, 1e-5)
    layout, planned = PageLayout.of(shape), plan(make_batch(decode(2)), TABLE, TABLE)
    for group in zip(*layout.layers, strict=True):
        sizes = {lora.adapters_of(planned, span, torch.zeros(2, span.in_features))[1] for span in group}
        assert len(sizes) == 1


# -- the base --------------------------------------------------------------------------------------------------

SHAPES = [(48, 40), (70, 2049), (130, 576), (33, 1300)]


def weights(out_features, in_features, bits, dtype):
    """A weight for the kernels, and what it stands for."""
    dense = torch.randn(out_features, in_features, dtype=dtype) / in_features**0.5
    if bits == 16:
        return dense, dense
    if isinstance(bits, str):
        return with_zeros(out_features, in_features, int(bits), dtype)
    packed = quantize_int8(dense) if bits == 8 else quantize_int4(dense, bits)
    return packed, dequantize(packed)


def with_zeros(out_features, in_features, group, dtype):
    """Random codes with a zero for each group, one of them 16, and what they stand for by the formula."""
    num_groups = -(-in_features // group)
    codes, zeros = torch.randint(16, (out_features, in_features)), torch.randint(17, (out_features, num_groups))
    zeros[0, 0] = 16
    scale = torch.rand(out_features, num_groups) / 8 / in_features**0.5
    wide = [part.repeat_interleave(group, 1)[:, :in_features] for part in (zeros, scale)]
    return pack_int4(codes, scale, zeros, group), ((codes - wide[0]) * wide[1]).to(dtype)


KINDS = {
    "dense": 16,
    "int8": 8,
    "int4-128": 128,
    "int4-64": 64,
    "int4-32": 32,
    "zeros-32": "32",
}


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("num_rows", [1, 17, 64])
def test_project_is_the_product(num_rows, shape, kind, dtype, tolerance):
    """Planes added up; odd inputs and outputs, groups that K is no multiple of, more rows than a program takes."""
    torch.manual_seed(0)
    packed, dense = weights(*shape, kind, dtype)
    planned = plan(make_batch(decode(num_rows)), TABLE, TABLE)
    x = torch.randn(num_rows, shape[1], dtype=dtype)
    product = gpu.project(gpu.Linear(packed), x, planned, LoraSpan(0, shape[1], (shape[0],)))
    assert len(product.out) == base_split(*shape)
    torch.testing.assert_close(product.out.sum(0).double(), x.double() @ dense.double().T, atol=tolerance, rtol=1e-3)


@pytest.mark.parametrize("kind", [16, 8, 64, "64"], ids=["dense", "int8", "int4", "zeros"])
def test_the_head_applies_the_norm(kind):
    torch.manual_seed(0)
    packed, dense = weights(151, 300, kind, torch.float32)
    tokens = torch.tensor([4, 0, 2])
    planned = plan(make_batch(decode(5), sampled=tokens), TABLE, TABLE)
    hidden, weight = 3 * torch.randn(5, 300), torch.randn(300)
    got = gpu.head(gpu.Linear(packed), gpu.begin(hidden, planned, weight, 1e-3), planned)
    expected = reference.rms_norm(hidden, weight, 1e-3)[tokens] @ dense.T
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)


def test_planes_follow_from_the_shape():
    """Never from the number of rows: a token's sums would depend on its neighbours."""
    assert [base_split(n, k) for n, k in ((5120, 3072), (3072, 3072), (16384, 3072), (3072, 8192))] == [2, 4, 1, 4]


@pytest.mark.parametrize("kind", [8, 128, 64, 32])
def test_codes_are_as_close_as_their_scale_allows(kind):
    torch.manual_seed(0)
    dense = torch.randn(9, 500)
    restored = dequantize(quantize_int8(dense) if kind == 8 else quantize_int4(dense, kind, uses_all_codes=False))
    group = 500 if kind == 8 else kind
    padded = torch.nn.functional.pad(dense, (0, -500 % group)).view(9, -1, group)
    step = padded.abs().amax(-1, keepdim=True) / (127 if kind == 8 else 7)
    assert ((restored - dense).abs() <= step.expand_as(padded).flatten(1)[:, :500] / 2 + 1e-6).all()


@pytest.mark.parametrize("kind", ["128", "64", "32"])
def test_codes_of_others_stand_for_the_same_numbers(kind):
    torch.manual_seed(0)
    for in_features in (500, 128, 40):
        packed, dense = with_zeros(9, in_features, int(kind), torch.float32)
        assert torch.equal(dequantize(packed), dense)
        assert packed.shape == dense.shape
        plain = packed._replace(zeros=None)
        assert torch.equal(dequantize(plain), dequantize(packed._replace(zeros=torch.full_like(packed.zeros, 8))))


@pytest.mark.parametrize("group", [128, 64, 32])
def test_the_largest_magnitude_gets_the_code_that_has_no_counterpart(group):
    """Whatever its sign; with a sixteenth more of the range, rounding errs by an eighth less."""
    torch.manual_seed(0)
    dense = torch.randn(40, 512)
    plain, full = (dequantize(quantize_int4(dense, group, uses_all_codes=full)) for full in (False, True))
    assert (full - dense).square().mean() < 0.85 * (plain - dense).square().mean()
    largest = dense.view(40, -1, group).abs().max(-1, keepdim=True)
    torch.testing.assert_close(
        full.view(40, -1, group).gather(-1, largest.indices), dense.view(40, -1, group).gather(-1, largest.indices)
    )


def test_quantizing_goes_by_slices(monkeypatch):
    """A slice is a row at least, and slices do not show."""
    torch.manual_seed(0)
    dense = torch.randn(9, 200)
    whole = quantize_int4(dense, 32), quantize_int8(dense)
    errors = [quant.relative_error(dense, packed) for packed in whole]
    asymmetric = with_zeros(9, 200, 32, torch.float32)
    assert quant.relative_error(asymmetric[1], asymmetric[0]) == 0
    monkeypatch.setattr(quant, "SLICE", 500)
    for one, other in zip(whole, (quantize_int4(dense, 32), quantize_int8(dense)), strict=True):
        assert torch.equal(one[0], other[0])
        assert torch.equal(one[1], other[1])
    for error, packed in zip(errors, whole, strict=True):
        assert error == pytest.approx(float((dequantize(packed) - dense).norm() / dense.norm()))
        assert error == pytest.approx(quant.relative_error(dense, packed))
    assert quant.relative_error(asymmetric[1], asymmetric[0]) == 0
    assert quant.relative_error(torch.zeros(3, 130), quantize_int8(torch.zeros(3, 130))) == 0


def test_zeros_stay_zeros():
    for packed in (quantize_int4(torch.zeros(3, 130), 32), quantize_int8(torch.zeros(3, 130))):
        assert not dequantize(packed).any()


def test_weights_of_one_input_are_put_together():
    torch.manual_seed(0)
    plain, dense = weights(8, 200, 64, torch.float32)
    asymmetric, its_dense = with_zeros(24, 200, 64, torch.float32)
    expected = torch.cat([dense, its_dense, dense])
    together = concatenate([plain, asymmetric, plain])
    assert isinstance(together, quant.Int4Weight)
    assert torch.equal(dequantize(together), expected)
    assert concatenate([plain, plain]).zeros is None
    for other in (its_dense, with_zeros(24, 200, 32, torch.float32)[0]):
        mixed = concatenate([plain, other])
        assert torch.equal(mixed[:8], dense)
        assert mixed.shape == (32, 200)
    assert concatenate([plain, its_dense.bfloat16()]).dtype == torch.bfloat16


def test_a_group_of_another_size_is_refused():
    with pytest.raises(ValueError, match="groups of 48 inputs are not supported"):
        quantize_int4(torch.zeros(2, 96), 48)


# -- attention -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("heads", "kv_heads", "size"), [(6, 2, 16), (4, 4, 24), (8, 1, 64)])
def test_chunks_are_combined(heads, kv_heads, size):
    """One key short of a chunk, a whole one, one more, and three; beside a prompt that crosses the border."""
    torch.manual_seed(0)
    rows = [(stop - 1, stop) for stop in (CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 77)] + [(CHUNK - 3, CHUNK + 4)]
    batch = make_batch(rows)
    caches = torch.randn(2, batch.block_tables.numel(), BLOCK_SIZE, kv_heads, size)
    q = torch.randn(len(batch.positions), heads, size)
    got = gpu.paged_attention(q, caches[0], caches[1], plan(batch, TABLE, TABLE))
    expected = reference.paged_attention(q, caches[0], caches[1], reference.plan(batch, TABLE, TABLE))
    torch.testing.assert_close(got, expected, atol=2e-5, rtol=1e-4)


def test_rows_longer_than_all_planes():
    """Every eighth chunk is seen by the same programs; tokens of one tile have different last chunks.

    Bit by bit what each token is alone, whatever is longest: a prompt in one piece, and token by token.
    """
    torch.manual_seed(0)
    border = PLANES * CHUNK
    table = torch.zeros(3 * border, 4)
    batch = make_batch([(border - 3, border + 4), (2 * border + 299, 2 * border + 300)][::-1])
    batch = dataclasses.replace(batch, num_decode=1)
    caches = torch.randn(2, batch.block_tables.numel(), BLOCK_SIZE, 2, 16)
    q = torch.randn(len(batch.positions), 4, 16)
    planned = plan(batch, table, table)
    assert planned.num_planes == PLANES
    got = gpu.paged_attention(q, caches[0], caches[1], planned)
    expected = reference.paged_attention(q, caches[0], caches[1], reference.plan(batch, table, table))
    torch.testing.assert_close(got, expected, atol=2e-5, rtol=1e-4)
    for token, position in enumerate(batch.positions.tolist()):
        alone = make_batch([(position, position + 1)])
        tables = batch.block_tables[min(token, 1) :][:1, : alone.block_tables.shape[1]]
        alone = dataclasses.replace(alone, block_tables=tables)
        single = gpu.paged_attention(q[token : token + 1], caches[0], caches[1], plan(alone, table, table))
        assert torch.equal(single, got[token : token + 1])


def test_keys_that_no_row_has_are_not_read():
    """Beyond a row's last key the table names no block, and block 0 is somebody else's: NaN here."""
    torch.manual_seed(0)
    batch = make_batch([(20, 21), (0, 19)])
    batch = dataclasses.replace(batch, block_tables=batch.block_tables + 1)
    caches = torch.randn(2, batch.block_tables.numel() + 1, BLOCK_SIZE, 2, 16)
    q = torch.randn(len(batch.positions), 4, 16)
    planned = plan(batch, TABLE, TABLE)
    clean = gpu.paged_attention(q, caches[0], caches[1], planned)
    caches[:, 0] = torch.nan
    assert torch.equal(gpu.paged_attention(q, caches[0], caches[1], planned), clean)


# -- nothing at all --------------------------------------------------------------------------------------------


def test_a_step_without_tokens():
    planned = plan(make_batch([]), TABLE, TABLE)
    span, linear = LoraSpan(0, 8, (8, 4, 4)), gpu.Linear(torch.randn(16, 8))
    hidden, weight = torch.zeros(0, 8), torch.ones(8)
    x = gpu.begin(hidden, planned, weight, 1e-5)
    assert isinstance(x, Activations)
    cache = torch.zeros(1, 4, 1, 4)
    product = gpu.project(linear, x, planned, span)
    q = gpu.finish_qkv(product, cache, cache, planned, span, HeadNorms(None, None, 1e-5), rotates=True)
    assert gpu.paged_attention(q, cache, cache, planned).shape == (0, 8)
    assert gpu.finish_gate_up(product, planned, span).shape == (0, 8)
    assert gpu.head(linear, x, planned).shape == (0, 16)
    assert gpu.draw(torch.zeros(0, 9), reference.Settings(*torch.zeros(6, 0))).shape == (0,)
