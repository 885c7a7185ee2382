"""Serve a policy over ZMQ, in the wire protocol of NVIDIA Isaac GR00T N1.6, and call it from a client.

with PolicyServer(policy, port=5555) as server:
    server.run()

with PolicyClient(port=5555) as client:
    action, info = client.get_action(observation)

GR00T's own clients work with this server, and this client with GR00T's server. Neither needs torch; both need pyzmq and
msgpack (`pip install "lara-adapter[serve]"`). The messages are described in :mod:`lara_adapter.serving.protocol`.
"""

from .client import PolicyClient
from .protocol import ModalityConfig, pack, unpack
from .server import PolicyServer

__all__ = ["ModalityConfig", "PolicyClient", "PolicyServer", "pack", "unpack"]
