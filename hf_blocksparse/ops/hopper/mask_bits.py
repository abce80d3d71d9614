"""Bits that say which coefficients of a tile are kept, in the registers of a product's result.

In a tile `[rows, columns]` of scores a thread holds two adjacent columns out of each eight, and four threads share a row. A word has the
bits of 32 columns of a row; each thread moves it down to its own first column, and then all threads look at the same bits.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.jit
def bits_between(words, begin, end):
    """Bits of the words with these numbers whose columns lie in `[begin, end)`."""
    first = gl.minimum(gl.maximum(begin - words * 32, 0), 32).to(gl.int64)
    last = gl.minimum(gl.maximum(end - words * 32, 0), 32).to(gl.int64)
    one = gl.full(words.shape, 1, gl.int64, words.type.layout)
    return ((one << last) - (one << first)).to(gl.int32)


@gluon.jit
def word_numbers(scores):
    """The numbers of the words of `scores` [rows, columns], which have the bits of 32 columns each: [1, words, 1]."""
    WORDS: gl.constexpr = scores.shape[1] // 32
    parts = gl.reshape(scores, [scores.shape[0], WORDS, 4, 4, 2])
    LAYOUT: gl.constexpr = gl.SliceLayout(2, gl.SliceLayout(4, parts.type.layout))
    words = gl.arange(0, WORDS, gl.SliceLayout(0, gl.SliceLayout(2, LAYOUT)))
    return gl.expand_dims(gl.expand_dims(words, 0), 2)


@gluon.jit
def load_words(
    bank, mask_id, query_in_tile, word, key_begin, key_end, scores,
    TILE_ROWS: gl.constexpr, TILE_WORDS: gl.constexpr,
):  # fmt: skip
    """Words of bits [rows, words, 1], of 32 keys each, for `scores` [rows, columns].

    Word number `word` of a mask in `bank`, whose masks have `TILE_ROWS` rows of `TILE_WORDS` words; of all bits where `mask_id` is -1. Keys
    outside `[key_begin, key_end)`, counted in their tile, are cleared. `mask_id`, `word` and both ends may be numbers, or tensors of one
    per word.
    """
    ROWS: gl.constexpr = scores.shape[0]
    parts = gl.reshape(scores, [ROWS, scores.shape[1] // 32, 4, 4, 2])
    LAYOUT: gl.constexpr = gl.SliceLayout(2, gl.SliceLayout(4, parts.type.layout))
    rows = gl.arange(0, ROWS, gl.SliceLayout(1, gl.SliceLayout(2, LAYOUT)))
    rows = gl.expand_dims(gl.expand_dims(rows, 1), 2)
    place = (query_in_tile + rows) * TILE_WORDS + word
    packed = gl.load(
        bank + mask_id.to(gl.int64) * (TILE_ROWS * TILE_WORDS) + place,
        mask=place + mask_id >= place,
        other=-1,
    )
    return packed & bits_between(word, key_begin, key_end)


@gluon.jit
def for_threads(words, scores):
    """Words [rows, words, 1] as `apply_mask` takes them: moved down to the first column of each of the 4 threads that share a row."""
    parts = gl.reshape(scores, [scores.shape[0], scores.shape[1] // 32, 4, 4, 2])
    LAYOUT: gl.constexpr = gl.SliceLayout(2, gl.SliceLayout(4, parts.type.layout))
    threads = gl.arange(0, 4, gl.SliceLayout(0, gl.SliceLayout(1, LAYOUT)))
    return words >> (2 * gl.expand_dims(gl.expand_dims(threads, 0), 1))


@gluon.jit
def load_mask(bank, mask_id, query_in_tile, key_begin, key_end, scores, TILE_SIZE: gl.constexpr):
    """What `apply_mask` takes, [rows, words, threads of a row], of one mask of `bank`, `TILE_SIZE x TILE_SIZE`; see `load_words`."""
    words = load_words(
        bank, mask_id, query_in_tile, word_numbers(scores), key_begin, key_end, scores,
        TILE_SIZE, TILE_SIZE // 32,
    )  # fmt: skip
    return for_threads(words, scores)


@gluon.jit
def read_mask(words, scores):
    """Words `[rows, columns // 32]` in shared memory as `apply_mask` takes them: [rows, words, threads of a row]."""
    ROWS: gl.constexpr = scores.shape[0]
    WORDS: gl.constexpr = scores.shape[1] // 32
    parts = gl.reshape(scores, [ROWS, WORDS, 4, 4, 2])
    LAYOUT: gl.constexpr = gl.SliceLayout(2, gl.SliceLayout(4, parts.type.layout))
    return for_threads(gl.expand_dims(words.load(gl.SliceLayout(2, LAYOUT)), 2), scores)


@gluon.jit
def apply_mask(scores, mask):
    """`scores` where the bit of `mask` [rows, words, threads of a row] is set, -inf elsewhere."""
    ROWS: gl.constexpr = scores.shape[0]
    COLUMNS: gl.constexpr = scores.shape[1]
    parts = gl.reshape(scores, [ROWS, COLUMNS // 32, 4, 4, 2])
    LAYOUT: gl.constexpr = parts.type.layout
    VECTOR: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(3, LAYOUT)))
    eighths = gl.arange(0, 4, gl.SliceLayout(1, VECTOR))
    columns = gl.arange(0, 2, gl.SliceLayout(0, VECTOR))
    bit = 1 << (8 * gl.expand_dims(eighths, 1) + gl.expand_dims(columns, 0))
    bit = gl.expand_dims(gl.expand_dims(gl.expand_dims(bit, 0), 1), 3)
    kept = (gl.expand_dims(gl.expand_dims(mask, 2), 4) & bit) != 0
    parts = gl.where(kept, parts, -float("inf"))
    return gl.convert_layout(gl.reshape(parts, [ROWS, COLUMNS]), scores.type.layout)
