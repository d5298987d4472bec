"""Answers from a list: a trie over token ids that `generate` may not leave."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import dropwhile
from typing import Any

from git_model.errors import UserError


class AnswerTrie:
    """The token sequences of the allowed answers.

    Args:
        answers: ids of each, the end token included; of two with the same ids the first counts.
        pad_id: what a finished row goes on with.

    Raises:
        UserError: no answers.
    """

    def __init__(self, answers: Mapping[str, Sequence[int]], pad_id: int) -> None:
        self.root: dict[int, Any] = {}
        self.texts: dict[tuple[int, ...], str] = {}
        self.after = [pad_id]
        for text, ids in answers.items():
            node = self.root
            for token in ids:
                node = node.setdefault(int(token), {})
            self.texts.setdefault(tuple(map(int, ids)), text)
        if not self.root:
            raise UserError("the list of answers is empty")
        self.longest = max(map(len, self.texts))

    def text(self, ids: Sequence[int]) -> str:
        """Return the answer as it is in the list, which decoding its tokens may not give back."""
        node, walked = self.root, []
        for token in dropwhile(lambda token: token not in self.root, ids):  # a decoder's start token
            if not node or token not in node:
                break
            node = node[token]
            walked.append(token)
        return self.texts[tuple(walked)]

    def following(self, ids: Sequence[int]) -> list[int]:
        """Return the tokens that may follow these first ones of an answer."""
        node: dict[int, Any] | None = self.root
        for token in ids:
            node = None if node is None else node.get(token)
        return list(node) if node else self.after  # nothing follows the end token

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
            return self.following(ids[start:].tolist())

        return allowed
