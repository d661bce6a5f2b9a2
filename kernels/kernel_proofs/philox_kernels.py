"""Kernels that run the device functions of the noise stream by themselves."""

import torch
import triton
import triton.language as tl
from sgfast_kernels.noise import philox
from torch import Tensor


@triton.jit
def _words_kernel(counter_ptr, seed_ptr, words_ptr, count, BD: tl.constexpr):
    o_x = tl.program_id(0) * BD + tl.arange(0, BD)
    m_x = o_x < count
    c0 = tl.load(counter_ptr + 4 * o_x, mask=m_x, other=0).to(tl.uint32)
    c1 = tl.load(counter_ptr + 4 * o_x + 1, mask=m_x, other=0).to(tl.uint32)
    c2 = tl.load(counter_ptr + 4 * o_x + 2, mask=m_x, other=0).to(tl.uint32)
    c3 = tl.load(counter_ptr + 4 * o_x + 3, mask=m_x, other=0).to(tl.uint32)
    w0, w1, w2, w3 = philox.philox(c0, c1, c2, c3, tl.load(seed_ptr))
    tl.store(words_ptr + 4 * o_x, w0.to(tl.int64), mask=m_x)
    tl.store(words_ptr + 4 * o_x + 1, w1.to(tl.int64), mask=m_x)
    tl.store(words_ptr + 4 * o_x + 2, w2.to(tl.int64), mask=m_x)
    tl.store(words_ptr + 4 * o_x + 3, w3.to(tl.int64), mask=m_x)


def words(counter: Tensor, seed: Tensor) -> Tensor:
    """Philox4x32-10 of (n, 4) counter words: (n, 4), as int64."""
    result = torch.empty_like(counter)
    _words_kernel[(triton.cdiv(len(counter), 65536),)](counter, seed, result, len(counter), BD=65536)
    return result


@triton.jit
def _parts_kernel(word_ptr, radius_ptr, cosine_ptr, sine_ptr, count, BD: tl.constexpr):
    o_x = tl.program_id(0) * BD + tl.arange(0, BD)
    m_x = o_x < count
    word = tl.load(word_ptr + o_x, mask=m_x, other=0).to(tl.uint32)
    cosine, sine = philox.cosine_and_sine(word)
    tl.store(radius_ptr + o_x, philox.radius(word), mask=m_x)
    tl.store(cosine_ptr + o_x, cosine, mask=m_x)
    tl.store(sine_ptr + o_x, sine, mask=m_x)


def parts(word: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Radius, cosine and sine of int64 words of 32 bits."""
    results = [torch.empty(len(word), device=word.device) for _ in range(3)]
    _parts_kernel[(triton.cdiv(len(word), 65536),)](word, *results, len(word), BD=65536)
    return results[0], results[1], results[2]
