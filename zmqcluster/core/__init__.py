"""The pure heart: events in, rows and actions out.

No clock, I/O, randomness of its own, await, or dependence on set order or hash(): time and a
seeded RNG are arguments. tests/architecture holds this folder to it.
"""
