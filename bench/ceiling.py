"""What the machine can do at most: matrix products through torch, on all the cores this process may use."""

import os
import time


def matrix_product_flops(dtype: str = "bfloat16", size: int = 2048, seconds: float = 3.0) -> float:
    """FLOP/s of the fastest of the products of two size × size matrices that fit into `seconds`."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    try:
        left, right = (torch.randn(size, size).to(getattr(torch, dtype)) for _ in range(2))
        out = torch.empty_like(left)
        torch.mm(left, right, out=out)  # the first product allocates and chooses its kernel
        fastest, end = float("inf"), time.perf_counter() + seconds
        while time.perf_counter() < end:
            started = time.perf_counter()
            torch.mm(left, right, out=out)
            fastest = min(fastest, time.perf_counter() - started)
        return 2 * size**3 / fastest
    finally:
        torch.set_num_threads(threads)
