"""How many tokens have logits at a time in the loss fused with the LM head; needs no torch.

A chunk is the tokens that the head's gradient is taken of in one product. The products are summed
in float32, so that each reads and writes that whole gradient (2.5 GB at 151,936 x 2,048): chunks
are as large as memory allows. The teacher's logits are needed only until the gradient of the same
tokens is written over the student's: they exist for a part of a chunk, one half of it.
"""

# elements of the student's logits in a chunk
CPU_CHUNK_ELEMENTS = 2**25
GPU_CHUNK_ELEMENTS = 3 * 2**27


def tokens_of_chunk(width: int, *, on_gpu: bool) -> int:
    """Tokens of a chunk for student logits of this width, where none are asked for.

    On a GPU it is a power of two, so that the tiles of its products come out even: at 2,048 tokens
    a hidden gradient 2,048 wide has 128 tiles of 128 x 256, for the 132 multiprocessors of an H100;
    at 2,816 tokens it would have 176, the last 44 of which run by themselves.
    """
    if not on_gpu:
        return max(1, CPU_CHUNK_ELEMENTS // width)
    return 1 << (max(1, GPU_CHUNK_ELEMENTS // width).bit_length() - 1)


def tokens_of_part(chunk_size: int) -> int:
    """Tokens of a chunk for which the teacher's logits exist at a time."""
    return -(-chunk_size // 2)
