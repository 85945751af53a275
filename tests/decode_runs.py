"""Batches for decode attention, whichever kernel runs it."""

import dataclasses

import jax
import jax.numpy as jnp
import kernel_runs
import numpy as np

from pallas_kernels.work_list import plan_decode

# An id of no page: where a table is not to be read.
_NOWHERE = 1 << 20


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """Sizes of a batch; see `decode_attention` for the letters."""

    lens: tuple[int, ...]
    N: int = 4
    K: int = 1
    S: int = 64
    H: int = 32
    num_ctas: int = 1
    dtype: str = "bfloat16"
    shared_pages: int = 0
    room: int = 0  # tokens of a request that shapes leave room for
    options: dict = dataclasses.field(default_factory=dict)

    def operands(self):
        """Shuffled pages; whatever no request may read is NaN."""
        rng = np.random.default_rng([7, *self.lens])
        sizes = [-(-n // self.S) for n in self.lens]
        most = max(*sizes, -(-self.room // self.S))
        num_pages = (len(self.lens) * most if self.room else sum(sizes)) + 3
        free = list(rng.permutation(num_pages))
        table = np.full((len(self.lens), most + 2), _NOWHERE, np.int32)
        is_seen = np.zeros((num_pages, self.S), bool)
        for request, (size, length) in enumerate(zip(sizes, self.lens, strict=True)):
            table[request, :size] = [free.pop() for _ in range(size)]
            table[request, : min(size, self.shared_pages)] = table[
                0, : min(size, self.shared_pages)
            ]
            for i, page in enumerate(table[request, :size]):
                is_seen[page, : min(self.S, length - i * self.S)] = True
        cache = rng.standard_normal((num_pages, 2, self.K, self.S, self.H))
        cache = np.where(is_seen[:, None, None, :, None], cache, np.nan)
        q = kernel_runs.normal(1, len(self.lens), self.N, self.H, dtype=self.dtype)
        lens = jnp.asarray(self.lens, jnp.int32)
        return q, jnp.asarray(cache, self.dtype), jnp.asarray(table), lens

    def plan(self, **options):
        options = {"num_ctas": self.num_ctas, "window": self.options.get("window"), **options}
        return plan_decode(self.lens, num_kv_heads=self.K, **options)

    @property
    def all_options(self):
        return {"scale": self.H**-0.5, **self.options}


CASES = {
    "small pages, one query head": Case(lens=(0, 1, 15, 16, 17, 100), N=2, K=2, S=16, num_ctas=2),
    "groups of five on three heads, large shared pages, a soft-cap, float16": Case(
        lens=(250, 127, 129, 7),
        N=15,
        K=3,
        S=128,
        H=80,
        num_ctas=2,
        dtype="float16",
        shared_pages=1,
        options={"softcap": 1.5},
    ),
    "wide heads, a window over a long context": Case(
        lens=(1000, 0, 64, 1), N=6, K=2, S=16, H=256, num_ctas=2, options={"window": 30}
    ),
}


def shapes(R=256, N=32, K=8, S=64, H=128, num_ctas=48, dtype=jnp.bfloat16):
    """Of a batch of contexts up to 8 k."""
    work = plan_decode([1] * R, num_kv_heads=K, num_ctas=num_ctas)
    arrays = [((R, N, H), dtype), ((4096, 2, K, S, H), dtype)]
    tables = [((R, 8192 // S), jnp.int32), ((R,), jnp.int32)]
    tables += [(field.shape, jnp.int32) for field in work]
    return [jax.ShapeDtypeStruct(*one) for one in arrays + tables]
