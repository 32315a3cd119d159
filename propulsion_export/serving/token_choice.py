"""Choose the next token of every row of a batch, and find the rows whose logits are no numbers."""

from collections.abc import Callable, Sequence

import numpy as np

from propulsion_export.adapters.scales import Array
from propulsion_export.serving.finite import lost_scores
from propulsion_export.serving.token_rules import Rule, apply_rules


class TokenChooser:
    """Chooses tokens by each row's own rules.

    Attributes:
        lost: the rows whose logits were NaN or infinite at some step, or ruled out every token,
            bool [batch]. What is chosen for them from then on is meaningless.
    """

    def __init__(
        self,
        starts: Sequence[Array],
        rules: Sequence[Sequence[Rule]],
        pick: Callable[[Array], Array],
    ) -> None:
        """Choose for rows whose decoders have read the tokens `starts`.

        Args:
            starts: int64 [length] for each row, without padding.
            rules: the rules for each row.
            pick: picks tokens [batch] from scores [batch, vocabulary].
        """
        self.lost = np.zeros(len(starts), np.bool_)
        self._tokens = [list(start) for start in starts]
        self._rules, self._pick = rules, pick

    def __call__(self, logits: Array) -> Array:
        """The next tokens, int64 [batch], from logits [batch, vocabulary]."""
        scores = np.asarray(logits, np.float32)
        self.lost |= np.isnan(scores).any(-1)
        if any(self._rules):
            scores = np.stack([self._score(row, own) for row, own in enumerate(scores)])
        self.lost |= lost_scores(scores)
        if self.lost.any():
            scores = np.where(self.lost[:, None], np.float32(0), scores)
        picked = self._pick(scores)
        for row, token in zip(self._tokens, picked, strict=True):
            row.append(int(token))
        return picked

    def _score(self, row: int, scores: Array) -> Array:
        if self.lost[row]:
            return scores
        return apply_rules(self._rules[row], np.array(self._tokens[row], np.int64), scores)
