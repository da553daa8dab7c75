"""The judge: sees every commit, start, answer and request at an origin, and knows the promises.

face.py is told of things by the nodes and asks the rooms, each of which keeps books of its own and
judges one thing. None shares a decision with the core.
"""
