"""What the machine can do at most: matrix products through torch, on all the cores this process may use."""

import os
import time


def matrix_product_flops(dtype: str = "bfloat16", size: int = 2048, seconds: float = 3.0) -> float:
    """FLOP/s of the fastest of the products of two size × size matrices that fit into `seconds`.

    On a machine that is too slow for that the matrices are smaller: the largest of 256 × 256, twice that and so on of
    which one product fits.
    """
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    try:
        now = min(256, size)
        fastest = _fastest_product(now, dtype, seconds=0.0)
        while now < size and 8 * fastest < seconds:
            now = min(2 * now, size)
            fastest = _fastest_product(now, dtype, seconds=0.0)
        return 2 * now**3 / min(fastest, _fastest_product(now, dtype, seconds))
    finally:
        torch.set_num_threads(threads)


def _fastest_product(size: int, dtype: str, seconds: float) -> float:
    """Seconds of the fastest product within `seconds`, of one at least."""
    import torch

    left, right = (torch.randn(size, size).to(getattr(torch, dtype)) for _ in range(2))
    out = torch.empty_like(left)
    torch.mm(left, right, out=out)  # the first product allocates and chooses its kernel
    fastest, end = float("inf"), time.perf_counter() + seconds
    while fastest == float("inf") or time.perf_counter() < end:
        started = time.perf_counter()
        torch.mm(left, right, out=out)
        fastest = min(fastest, time.perf_counter() - started)
    return fastest


def ceilings() -> dict[str, float]:
    """FLOP/s of matrix products, by dtype. Without units for bfloat16 a machine is hundreds of times slower in it."""
    return {dtype: matrix_product_flops(dtype) for dtype in ("bfloat16", "float32")}
