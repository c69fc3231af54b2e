"""What is built on the API: `ActorPool`."""

from nbray.util.actor_pool import ActorPool

__all__ = ["ActorPool"]
