"""What a dense batch is made of when requests of one kind come and go for ever.

Source: arXiv 2408.12757 section 3 (dense batch of decode rows and of prompts' tokens, kept constant
by the scheduler); the rest follows from requests being at every point of their lives alike.
"""

import dataclasses
import math


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mix:
    """Requests that are all alike, such as the 512/512 of the paper; lengths may be means.

    Attributes:
        prompt_len: Tokens of a prompt.
        output_len: Tokens that follow it.
    """

    prompt_len: float
    output_len: float

    def __post_init__(self) -> None:
        if self.prompt_len < 1 or self.output_len < 0:
            raise ValueError(
                f"requests of {self.prompt_len:g} tokens and {self.output_len:g} more are none; "
                "give a prompt at least one token"
            )

    def __str__(self) -> str:
        return f"{self.prompt_len:g}/{self.output_len:g}"

    @property
    def decode_share(self) -> float:
        """Rows that have one token to do, of all tokens of a dense batch.

        A request has `prompt_len` tokens done in chunks and `output_len` as rows, and so has the
        batch over time.
        """
        return self.output_len / (self.prompt_len + self.output_len)

    def decode_rows(self, num_tokens: int) -> int:
        """Rows of a dense batch of so many tokens that have one token to do."""
        return round(num_tokens * self.decode_share)

    def chunks(self, num_tokens: int) -> int:
        """Most chunks that so many tokens of prompts are: the first and the last may be parts."""
        return math.ceil(num_tokens / self.prompt_len) + 1 if num_tokens else 0

    @property
    def decode_context(self) -> float:
        """Tokens that a decode row sees on average: its prompt and half of the output."""
        return self.prompt_len + self.output_len / 2

    @property
    def prefix(self) -> float:
        """Tokens that a prompt's token sees on average."""
        return self.prompt_len / 2
