"""The mask function says exactly what transformers' own mask says, without storing it."""

import pytest
import torch
from torch import Tensor
from transformers import masking_utils as own
from transformers.masking_utils import sdpa_mask

from hf_blocksparse.transformers_masks import SequenceMask, make_mask, mask_from_tensor

LENGTH = 24


def expand(mask: SequenceMask) -> tuple[Tensor, Tensor]:
    """What a SequenceMask means, as bool [batch, heads, query_len, kv_len], and which query rows belong to a sequence."""
    batch, _, query_len, kv_len = mask.shape
    heads = 1 if mask.dense is None else mask.dense.shape[1]
    allowed = torch.zeros(batch, heads, query_len, kv_len, dtype=torch.bool)
    queries = torch.zeros(batch, query_len, dtype=torch.bool)
    for row, q_row, q_len, q_pos, kv_row, keys, kv_pos in mask.sequences.table.tolist():
        i = q_pos + torch.arange(q_len)[:, None]
        j = kv_pos + torch.arange(keys)[None, :]
        visible = torch.ones(q_len, keys, dtype=torch.bool)
        if mask.is_causal:
            visible &= j <= i
        if mask.window_tokens is not None:
            visible &= (i - j).abs() < mask.window_tokens
        if mask.chunk_tokens is not None:
            visible &= i // mask.chunk_tokens == j // mask.chunk_tokens
        allowed[row, :, q_row : q_row + q_len, kv_row : kv_row + keys] = visible
        queries[row, q_row : q_row + q_len] = True
    if mask.dense is not None:
        allowed &= mask.dense
    return allowed, queries


def check(real_queries: Tensor | None = None, **arguments) -> SequenceMask:
    arguments = {"batch_size": 3, "q_length": LENGTH, "kv_length": LENGTH} | arguments
    mask = make_mask(**arguments)
    skips = {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
    expected = sdpa_mask(**(arguments | skips))
    allowed, queries = expand(mask)
    if real_queries is None:
        real_queries = torch.ones_like(queries)
    kept = real_queries[:, None, :, None]
    torch.testing.assert_close(allowed & kept, expected.expand_as(allowed) & kept)
    # A query outside every sequence gives 0; only padding may be.
    assert not (real_queries & ~queries & expected.any(3)[:, 0]).any()
    return mask


def padding(*ranges: tuple[int, int], length: int = LENGTH) -> Tensor:
    mask = torch.zeros(len(ranges), length, dtype=torch.bool)
    for row, (start, stop) in zip(mask, ranges, strict=True):
        row[start:stop] = True
    return mask


def mask_functions() -> dict[str, object]:
    left = torch.tensor([5, 0, 0])
    return {
        "causal": own.causal_mask_function,
        "bidirectional": own.bidirectional_mask_function,
        "sliding": own.sliding_window_causal_mask_function(7),
        "bidirectional sliding": own.sliding_window_bidirectional_mask_function(7),
        "chunked": own.chunked_causal_mask_function(6, left),
    }


PADDINGS = {
    "none": None,
    "ones": padding((0, LENGTH), (0, LENGTH), (0, LENGTH)),
    "both sides": padding((5, LENGTH), (0, 17), (0, LENGTH)),
    "a row of padding": padding((5, LENGTH), (0, 0), (0, LENGTH)),
}


@pytest.mark.parametrize("pad", PADDINGS)
@pytest.mark.parametrize("name", mask_functions())
def test_known_masks_are_recognised(name, pad):
    mask_function = mask_functions()[name]
    if name == "chunked" and pad in ("none", "ones"):
        mask_function = own.chunked_causal_mask_function(6, torch.zeros(3, dtype=torch.long))
    attention_mask = PADDINGS[pad]
    mask = check(attention_mask, mask_function=mask_function, attention_mask=attention_mask)
    assert mask.dense is None


def test_holes_in_the_padding_are_exact():
    attention_mask = padding((5, LENGTH), (0, 17), (0, LENGTH))
    attention_mask[:, 9:12] = False
    mask = check(
        attention_mask, mask_function=own.causal_mask_function, attention_mask=attention_mask
    )
    assert mask.dense is not None and mask.dense.shape == (3, 1, 1, LENGTH)


@pytest.mark.parametrize("as_tensor", [False, True])
@pytest.mark.parametrize("name", ["causal", "sliding"])
@pytest.mark.parametrize("pad", ["none", "both sides"])
def test_decoding_with_growing_and_with_static_caches(name, pad, as_tensor):
    seen, new = 18, 3
    offset = torch.tensor(seen) if as_tensor else seen
    attention_mask = (
        None
        if pad == "none"
        else padding((5, seen + new), (0, seen + new), (2, seen + new), length=seen + new)
    )
    for kv_length in (seen + new, 32):
        check(
            q_length=new,
            kv_length=kv_length,
            q_offset=offset,
            mask_function=mask_functions()[name],
            attention_mask=attention_mask,
        )


@pytest.mark.parametrize("as_tensor", [False, True])
def test_decoding_with_a_sliding_cache(as_tensor):
    count = torch.tensor if as_tensor else int
    check(
        q_length=2,
        kv_length=count(8),
        q_offset=count(30),
        kv_offset=count(24),
        mask_function=own.sliding_window_causal_mask_function(7),
        attention_mask=padding((5, 32), (0, 32), (26, 32), length=32),
    )


def test_the_cache_may_count_on_in_place():
    offset = torch.tensor(18)
    arguments = dict(batch_size=1, q_length=1, kv_length=32, allow_is_causal_skip=False)
    mask = make_mask(q_offset=offset, mask_function=own.causal_mask_function, **arguments)
    offset.add_(1)
    assert mask.own_mask("sdpa").sum() == 19


def test_packed_documents():
    position_ids = torch.cat([torch.arange(9), torch.arange(4), torch.arange(11)]).repeat(3, 1)
    position_ids[2] = torch.arange(LENGTH)
    documents = own.find_packed_sequence_indices(position_ids)
    for inner in (own.causal_mask_function, own.sliding_window_causal_mask_function(5)):
        functions = [own.and_masks(inner, own.packed_sequence_mask_function(documents))]
        if hasattr(own, "packed_sequence_compatibility_function"):
            functions.append(
                own.packed_sequence_compatibility_function(inner, position_ids, documents)
            )
        for mask_function in functions:
            mask = check(mask_function=mask_function)
            assert mask.dense is None and mask.sequences.num_sequences == 7


def documents_of(mask: SequenceMask) -> list[list[int]]:
    """[batch row, first row, length] of every sequence that holds a token."""
    return [row[:3] for row in mask.sequences.table.tolist() if row[2]]


def test_packed_documents_keep_their_positions_under_any_mask_function():
    ids = torch.arange(LENGTH).repeat(3, 1) // 9
    packed = own.packed_sequence_mask_function(ids)
    expected = [[row, start, min(9, LENGTH - start)] for row in range(3) for start in (0, 9, 18)]
    chunked = own.chunked_causal_mask_function(6, torch.zeros(3, dtype=torch.long))
    for inner in (
        chunked,
        odd_keys,
        own.or_masks(own.causal_mask_function, own.and_masks(packed, prefix)),
    ):
        mask = check(mask_function=own.and_masks(inner, packed))
        assert mask.dense is not None and documents_of(mask) == expected
    mask = check(mask_function=own.and_masks(own.causal_mask_function, packed), use_vmap=True)
    assert mask.dense is not None and documents_of(mask) == expected
    real = PADDINGS["both sides"]
    mask = check(
        real, mask_function=own.and_masks(own.causal_mask_function, packed), attention_mask=real
    )
    assert documents_of(mask)[:4] == [[0, 5, 4], [0, 9, 9], [0, 18, 6], [1, 0, 9]]


def test_documents_that_read_each_other_are_refused():
    packed = own.packed_sequence_mask_function(torch.arange(LENGTH).repeat(3, 1) // 9)
    with pytest.raises(NotImplementedError, match="a mask function that lets them read each other"):
        make_mask(3, LENGTH, LENGTH, mask_function=own.or_masks(packed, prefix))


def prefix(batch, head, query, key):
    return key < 6


def odd_keys(batch, head, query, key):
    return key % 2 == 1


@pytest.mark.parametrize(
    "mask_function",
    [
        own.or_masks(own.causal_mask_function, prefix),
        own.and_masks(own.causal_mask_function, odd_keys),
        own.sliding_window_overlay(7),
        own.and_masks(
            own.chunked_causal_mask_function(6, torch.zeros(3, dtype=torch.long)),
            own.packed_sequence_mask_function(torch.arange(LENGTH).repeat(3, 1) // 9),
        ),
    ],
    ids=["prefix", "user", "one-sided window", "packed chunks"],
)
@pytest.mark.parametrize("pad", ["none", "both sides"])
def test_other_masks_are_evaluated(mask_function, pad):
    attention_mask = PADDINGS[pad]
    mask = check(attention_mask, mask_function=mask_function, attention_mask=attention_mask)
    assert mask.dense is not None


def test_mask_functions_of_the_user_are_not_trusted():
    # The flag says that a user's function is among them, whatever they look like.
    mask = check(mask_function=own.causal_mask_function, use_vmap=True)
    assert mask.dense is not None and not mask.is_causal


def test_a_mask_can_be_copied_and_moved_and_nothing_else():
    mask = make_mask(2, LENGTH, LENGTH, mask_function=own.sliding_window_causal_mask_function(7))
    for copy in (mask.clone(), mask.detach(), mask.contiguous(), mask.to("cpu")):
        assert isinstance(copy, SequenceMask) and copy.window_tokens == 7
    assert mask.to("meta").sequences.table.device.type == "meta"
    assert tuple(mask.shape) == (2, 1, LENGTH, LENGTH) and mask.dtype == torch.bool
    with pytest.raises(NotImplementedError, match="a description without entries"):
        mask + 1
    with pytest.raises(NotImplementedError, match="a description without entries"):
        mask[:, :, :5]
    with pytest.raises(NotImplementedError, match="a description without entries"):
        mask.to(torch.float32)


def test_masks_need_the_tokens_in_the_cache():
    with pytest.raises(
        ValueError, match=r"attention_mask got 20 tokens; the queries end at token 24"
    ):
        make_mask(1, 4, 24, q_offset=20, attention_mask=torch.ones(1, 20, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"it must be \(batch, length\) with batch 2"):
        make_mask(2, 4, 4, attention_mask=torch.ones(1, 4, dtype=torch.bool))


def test_given_tensors_are_exact():
    torch.manual_seed(0)
    given = torch.rand(2, 4, LENGTH, LENGTH) > 0.5
    given[0, :, :5] = given[0, :, :, :5] = False
    as_float = torch.zeros(given.shape).masked_fill(~given, float("-inf"))
    as_lowest = torch.zeros(given.shape).masked_fill(~given, torch.finfo(torch.float32).min)
    for tensor in (given, as_float, as_lowest):
        mask = mask_from_tensor(tensor, 2, LENGTH, LENGTH)
        assert (expand(mask)[0] == given).all()
        # Positions count from the first token that reads or is read.
        assert mask.sequences.table[:, 1].tolist() == [5, 0]
        assert mask_from_tensor(tensor, 2, LENGTH, LENGTH) is mask
    given[1, 0, 3, 2] ^= True
    assert (expand(mask_from_tensor(given, 2, LENGTH, LENGTH))[0] == given).all()
    assert (expand(mask_from_tensor(given[:1], 2, LENGTH, LENGTH))[0] == given[:1]).all()


def test_given_tensors_that_cannot_be_honoured():
    with pytest.raises(ValueError, match="entries that are neither 0 nor -inf"):
        mask_from_tensor(torch.full((1, 1, 4, 4), -1.5), 1, 4, 4)
    with pytest.raises(
        ValueError, match=r"attention_mask got shape \(1, 4\); it must be \(1, 1 or heads, 4, 4\)"
    ):
        mask_from_tensor(torch.ones(1, 4), 1, 4, 4)
    with pytest.raises(NotImplementedError, match="1 queries and 4 keys; it does not say where"):
        mask_from_tensor(torch.ones(1, 1, 1, 4, dtype=torch.bool), 1, 1, 4)
