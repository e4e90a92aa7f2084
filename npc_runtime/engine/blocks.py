"""Who owns which KV block. Counts blocks; knows nothing of tensors. (The prefix cache will live here.)"""

from npc_runtime.engine.core import Sequence

__all__ = ["BlockAllocator"]


class BlockAllocator:
    """A free list over `num_blocks` blocks of `block_size` tokens.

    A sequence gets all the blocks it can ever need when it is admitted, so that a running line never waits.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._free = list(range(num_blocks))

    @property
    def num_used(self) -> int:
        """Blocks that sequences hold."""
        return self.num_blocks - len(self._free)

    def num_needed(self, sequence: Sequence) -> int:
        """Blocks for the sequence's prompt and its longest reply."""
        return -(-sequence.max_tokens // self.block_size)

    def can_allocate(self, sequence: Sequence) -> bool:
        """Whether `allocate` would succeed now."""
        return self.num_needed(sequence) <= len(self._free)

    def allocate(self, sequence: Sequence) -> None:
        """Give the sequence its blocks; the caller asked `can_allocate` first."""
        assert self.can_allocate(sequence)
        assert not sequence.blocks
        sequence.blocks = [self._free.pop() for _ in range(self.num_needed(sequence))]

    def free(self, sequence: Sequence) -> None:
        """Take the sequence's blocks back."""
        self._free.extend(sequence.blocks)
        sequence.blocks = []

    def check_integrity(self, owners: list[Sequence]) -> None:
        """Assert that every block has exactly one owner: the free list or one of the sequences."""
        held = self._free + [block for sequence in owners for block in sequence.blocks]
        assert sorted(held) == list(range(self.num_blocks)), "a KV block is lost or owned twice"
