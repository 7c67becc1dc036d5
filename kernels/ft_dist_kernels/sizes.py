"""Sizes of chunks and tiles, without torch: the planner counts with the same arithmetic as the kernels."""

TILE_ELEMENTS = 256 * 1024
"""Elements per operand in one block of an elementwise pass on CPU: the blocks of all operands stay in cache"""

GPU_LOGITS_BYTES, GPU_CHUNK_ROWS = 256 * 2**20, (1024, 4096)
CPU_LOGITS_BYTES, CPU_CHUNK_ROWS = 96 * 2**20, (128, 1024)
WIDENED_TILE_BYTES = 4 * 2**20
CPU_TILES = 16
"""Tiles of the vocabulary on CPU: oneDNN's product has no `out`, so only one tile of logits exists twice"""

MAX_EXTENDED_RANK = 64
"""Highest rank per member of an extended weight: the dB of a higher one does not fit on chip next to its tile"""


def chunk_rows(count: int, vocabulary: int, *, gpu: bool, bytes_per_logit: int) -> int:
    """Rows per chunk of the loss: what the logits budget allows within the device's bounds, split evenly.

    Never below the lower bound, and less than twice that if `count` divides badly.
    """
    budget, (low, high) = (GPU_LOGITS_BYTES, GPU_CHUNK_ROWS) if gpu else (CPU_LOGITS_BYTES, CPU_CHUNK_ROWS)
    rows = max(low, min(high, budget // (vocabulary * bytes_per_logit)))
    chunks = -(-count // rows)
    if count < chunks * low:
        chunks = max(1, count // low)
    return max(1, -(-count // chunks)) if count else 1


def tile_rows(rows: int, width: int, *, cpu: bool, widened_item: int) -> int:
    """Rows per tile of a (rows, width) matrix. `widened_item`: bytes of an element it is widened to; 0 if it is not."""
    if not widened_item:
        return max(1, rows // CPU_TILES if cpu else rows)
    step = max(256, WIDENED_TILE_BYTES // (max(width, 1) * widened_item))
    return max(1, min(step, rows // CPU_TILES)) if cpu else step
