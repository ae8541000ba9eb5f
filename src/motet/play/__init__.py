"""A local page with a preference dial: one language model, several tastes, answers side by side.

In:  a ``Playable``: a model whose adapter is a weighted sum of prototypes, with the selector that infers tastes.
Out: a page on this computer's own address. It asks nothing of the network, and nothing typed leaves the machine.

``contract.py`` says what the page needs of a model; ``page.py`` is the page, ``server.py`` serves it. The page is made
with gradio, which is an extra: it is imported inside functions only.
"""

from motet.play.contract import Map, Person, Playable
from motet.play.page import build
from motet.play.server import serve, start

__all__ = ["Map", "Person", "Playable", "build", "serve", "start"]
