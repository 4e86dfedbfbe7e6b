"""The journal: every part, every state, every action of an operator, and pictures of rejects."""
