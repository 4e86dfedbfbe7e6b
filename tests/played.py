"""A child process that is played by the test, for what real ones do too rarely."""

from stpm.edge.channel import Channel, pair


class Played:
    """In place of a Worker. It says what the test says, and ends when the test closes its channel, `there`."""

    def __init__(self, says, hears):
        ours, theirs = pair()
        self.channel, self.there = Channel(ours, says), Channel(theirs, hears)
        self.end = theirs
        self.process = self
        self.killed = False

    def kill(self):
        self.killed = True

    def poll(self):
        return -9 if self.there.fileno() < 0 else None
