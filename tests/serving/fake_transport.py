"""A connection that leads nowhere."""

import asyncio


class Sent(asyncio.Transport):
    """A transport that writes nowhere."""

    def __init__(self):
        super().__init__()
        self.writes = []
        self.closed_after = None

    def write(self, data):
        self.writes.append(data)

    def close(self):
        self.closed_after = len(self.writes)

    def is_closing(self):
        return self.closed_after is not None

    def pause_reading(self):
        pass

    def resume_reading(self):
        pass
