"""API keys: read once, kept and compared as digests only."""

import base64
import binascii
import hashlib
import hmac
import os
import pathlib
from collections.abc import Iterable, Mapping

_VARIABLE = "NANOFLOW_API_KEY"
_MAX_KEYS = 1000


class ApiKeys:
    """The keys that open a server; none means that it is open."""

    def __init__(self, keys: Iterable[str]) -> None:
        self._digests = tuple(_digest(key.encode()) for key in keys)

    @classmethod
    def load(cls, path: str, environment: Mapping[str, str] = os.environ) -> "ApiKeys":
        """Reads the keys of a file and of the environment.

        Args:
            path: One key in a line; empty for no file.
            environment: May hold a key.

        Raises:
            ValueError: The file cannot be read or holds no key.
        """
        keys = [environment[_VARIABLE]] if environment.get(_VARIABLE) else []
        if path:
            try:
                lines = pathlib.Path(path).read_text(encoding="utf-8").splitlines()
            except (OSError, UnicodeDecodeError) as error:
                raise ValueError(f"--api_key_file={path} cannot be read: {error}") from error
            found = [line.strip() for line in lines if line.strip()]
            if not found:
                raise ValueError(f"--api_key_file={path} holds no key; write one in a line")
            if len(found) > _MAX_KEYS:
                raise ValueError(f"--api_key_file={path} holds more than {_MAX_KEYS} keys")
            keys += found
        return cls(keys)

    @property
    def are_needed(self) -> bool:
        """Whether requests need a key."""
        return bool(self._digests)

    def open_to(self, authorization: bytes | None) -> bool:
        """Whether a request with this Authorization header may come in.

        Args:
            authorization: `Bearer KEY`, or `Basic` with the key as password, which is what
                browsers send; None if the header is not there.
        """
        if not self._digests:
            return True
        kind, _, rest = (authorization or b"").strip().partition(b" ")
        if kind.lower() == b"basic":
            try:
                rest = base64.b64decode(rest.strip(), validate=True).partition(b":")[2]
            except binascii.Error:
                return False
        elif kind.lower() != b"bearer":
            return False
        given = _digest(rest.strip())
        # Every key is compared, so that the time does not tell which was near.
        matches = [hmac.compare_digest(given, digest) for digest in self._digests]
        return any(matches)


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
