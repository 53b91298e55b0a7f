"""The server's StepModel with no numbers in its caches but the tokens themselves.

A row's history is read back from the nodes that it sees, so a wrong node, mask or position changes
the answer or fails.
"""

import numpy as np


class Histories:
    """Feeds `continue_rows(images, histories) -> log_probs (R, V)`; the rest of V is -inf.

    `images[slot]` names the image in a slot; at first the slot itself.
    """

    bos_id = 0

    def __init__(self, continue_rows, vocab_size, *, eos_id=1, max_length=32, slots=64):
        self.continue_rows = continue_rows
        self.vocab_size = vocab_size
        self.eos_id = eos_id
        self.max_length = max_length
        self.images = list(range(slots))
        self.nodes = {}  # (slot, node): (position, token)
        self.fed = []  # of every step, the rows of each slot
        self.cleared = []

    def step(self, rows, top_k):
        fed = {}
        for slot, node, position, token in zip(
            rows.slot.tolist(),
            rows.node.tolist(),
            rows.position.tolist(),
            rows.token_ids.tolist(),
            strict=True,
        ):
            self.nodes[slot, node] = (position, token)
            assert rows.node_position[slot, node] == position
            fed[slot] = fed.get(slot, 0) + 1
        self.fed.append(fed)
        histories = [self._history(rows, row) for row in range(len(rows.slot))]
        images = [self.images[slot] for slot in rows.slot.tolist()]
        log_probs = self.continue_rows(images, histories)
        ids = np.argsort(-log_probs, axis=1, kind="stable")[:, :top_k]
        ids.flags.writeable = False  # the caller must not write into a model's outputs
        return np.take_along_axis(log_probs, ids, axis=1), ids

    def clear(self, slot):
        self.cleared.append(slot)

    def _history(self, rows, row):
        slot, column = int(rows.slot[row]), int(rows.column[row])
        seen = np.flatnonzero(rows.visible[slot, column] == 0)
        assert rows.node[row] in seen
        assert np.isneginf(np.delete(rows.visible[slot, column], seen)).all()
        tokens = sorted(self.nodes[slot, node] for node in seen.tolist())
        assert [position for position, _ in tokens] == list(range(int(rows.position[row]) + 1))
        return tuple(token for _, token in tokens)


def scripted(script, vocab_size, **options):
    """Returns a model whose rows continue by `script(image, history) -> log_probs (V,)`."""

    def continue_rows(images, histories):
        return np.stack([script(*row) for row in zip(images, histories, strict=True)])

    return Histories(continue_rows, vocab_size, **options)
