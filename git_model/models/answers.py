"""Answers from a list: a trie over token ids that `generate` may not leave."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from git_model.errors import UserError


class AnswerTrie:
    """The token sequences of the allowed answers.

    Args:
        answers: ids of each, the end token included.
        pad_id: what a finished row goes on with.

    Raises:
        UserError: no answers.
    """

    def __init__(self, answers: Iterable[Sequence[int]], pad_id: int) -> None:
        self.root: dict[int, Any] = {}
        self.longest = 0
        self.after = [pad_id]
        for ids in answers:
            node = self.root
            for token in ids:
                node = node.setdefault(int(token), {})
            self.longest = max(self.longest, len(ids))
        if not self.root:
            raise UserError("the list of answers is empty")

    def constraint(self) -> Callable[[int, Any], list[int]]:
        """Return what `generate` takes as `prefix_allowed_tokens_fn`; one for each call.

        The ids it is shown begin with a prompt for some models and with the first new token for others: the first
        call, before any token is made, says which.
        """
        start: int | None = None

        def allowed(_: int, ids: Any) -> list[int]:
            nonlocal start
            if start is None:
                start = len(ids)
            node: dict[int, Any] | None = self.root
            for token in ids[start:].tolist():
                node = None if node is None else node.get(token)
            return list(node) if node else self.after  # nothing follows the end token

        return allowed
