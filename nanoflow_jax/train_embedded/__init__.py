"""Trains the small model that ships with the project: `python -m nanoflow_jax.train_embedded`.

Text is CPython's standard library, read from the Python that runs this program. `corpus` and
`chat_rows` choose the text, `tokenizer_training` cuts it into tokens, `rows` packs it for grain,
`model_training` trains with optax and saves with Orbax, `export` writes a Hugging Face folder.
"""
