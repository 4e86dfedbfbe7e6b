"""Fault tests: a real line (`stpm-run` with its processes) between a camera and a PLC, broken on purpose.

python -m stpm.tools.faults --bundle bundles/screw-int8

scenarios/   what is broken, a few lines each     bench.py    the line under test, and what is seen of it
checks.py    what must be true after each of them  peers.py    the PLCs at the other end, one for each protocol
evidence.py  what a scenario leaves to be checked  stream.py   a network camera;  clock.py  a wall clock to set
"""
