"""A small made-up library for the training tests: no file of it depends on the Python in use."""

import pathlib

from nanoflow_jax.train_embedded import settings

_WORDS = "alpha beta gamma delta omega kappa sigma theta lambda zeta".split()


def write(root: pathlib.Path, *, num_files: int = 24) -> pathlib.Path:
    """Writes `num_files` modules of a few functions each."""
    for i in range(num_files):
        folder = root / f"package_{i % 3}"
        folder.mkdir(parents=True, exist_ok=True)
        text = "\n\n".join(_function(i, j) for j in range(6))
        (folder / f"module_{i}.py").write_text(f'"""Tools for part {i}."""\n\n{text}\n')
    return root


def _function(i: int, j: int) -> str:
    word, other = _WORDS[(i + j) % 10], _WORDS[(3 * i + j) % 10]
    return (
        f"def {word}_{other}(left, right):\n"
        f'    """Return the {word} of left and the {other} of right.\n\n'
        f'    More {i} {j}.\n    """\n'
        f"    total = left + {i}\n"
        f"    return total * right - {j}\n"
    )


def tiny_settings(root: pathlib.Path, **train: object) -> settings.Settings:
    """Settings for seconds of training on that library.

    Most tests train with these as they are, so that one compiled step serves them all.
    """
    chosen = {"num_steps": 20, "batch_rows": 2, "short_len": 64, "warmup_steps": 2, **train}
    return settings.Settings(
        corpus=settings.CorpusSettings(root=str(root), held_out_one_in=4, vocab_size=320),
        shape=settings.ShapeSettings(
            num_layers=1,
            hidden_size=32,
            num_heads=4,
            num_kv_heads=2,
            head_dim=8,
            intermediate_size=48,
            context_len=64,
        ),
        train=settings.TrainSettings(**chosen),
    )
