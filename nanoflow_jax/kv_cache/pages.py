"""Which pages of the KV cache are free. Plain Python: the scheduler counts pages, never arrays."""

import heapq
from collections.abc import Iterable


class PageAllocator:
    """Hands out page ids, lowest first, and takes them back.

    Low ids first keeps a lightly loaded cache in few, recently touched pages, and makes a
    run repeatable: the same takes and gives always answer the same ids.

    Invariant: the free heap holds each free id once, `_is_free` says the same for every id,
    and ids in neither place are held by a request.
    """

    def __init__(self, num_pages: int) -> None:
        """Start with every page free.

        Args:
            num_pages: Pages in the cache; ids are [0, num_pages).

        Raises:
            ValueError: If there is no page at all.
        """
        if num_pages < 1:
            raise ValueError(
                f"num_pages={num_pages}, wanted at least 1; give the cache more memory"
            )
        self._heap = list(range(num_pages))
        self._is_free = bytearray(b"\x01") * num_pages

    @property
    def num_pages(self) -> int:
        """Pages in the cache, free or held."""
        return len(self._is_free)

    @property
    def num_free(self) -> int:
        """Pages nobody holds."""
        return len(self._heap)

    def try_take(self, count: int) -> list[int] | None:
        """The `count` lowest free ids, in order; None, and nothing taken, when too few are free."""
        assert count >= 0, f"asked for {count} pages"
        if count > len(self._heap):
            return None
        taken = [heapq.heappop(self._heap) for _ in range(count)]
        for page in taken:
            self._is_free[page] = 0
        return taken

    def give_back(self, pages: Iterable[int]) -> None:
        """Free pages that `try_take` handed out; giving back a free page is our own bug."""
        for page in pages:
            assert 0 <= page < self.num_pages, f"page {page} is not in this cache"
            assert not self._is_free[page], f"page {page} was given back twice"
            self._is_free[page] = 1
            heapq.heappush(self._heap, page)

    def check(self) -> None:
        """Raise AssertionError if the heap and the map of free pages disagree."""
        free = sorted(self._heap)
        assert free == sorted(set(free)), "a page is in the free heap twice"
        marked = [page for page, is_free in enumerate(self._is_free) if is_free]
        assert free == marked, "the free heap and the map of free pages disagree"
        for child in range(1, len(self._heap)):
            assert self._heap[(child - 1) // 2] <= self._heap[child], (
                "the free heap is out of order"
            )
