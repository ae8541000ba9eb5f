"""Real sites over Flower 1.41: a SuperLink in the middle, a SuperNode at every site.

``frames`` turns frames into Flower's records and back; ``carrier`` is the engine on the server's side; ``apps`` holds
the two apps that Flower starts; ``kits`` provisions; ``processes`` starts, follows and ends Flower's own. The folder
``app`` is what ``flwr run`` takes: it names the two apps and holds no code.

Flower starts a new process for every message (7 to 11 s a query on a quiet machine, before any model is loaded), so the
FedVPA-GP family runs here, a few long rounds; MoR asks at every step and belongs to FLARE.
"""
