"""Floor 5: what is found from data before training or packing."""

from .observers import OBSERVERS, Observer, ObserverOptions
from .passes import calibrate

__all__ = ["OBSERVERS", "Observer", "ObserverOptions", "calibrate"]
