"""Floor 5: what is found from data before training or packing."""

from .fit_report import FitReport, FitRow
from .fitting import fit_weights
from .layer_fit import METHODS
from .observers import OBSERVERS, Observer, ObserverOptions
from .passes import calibrate

__all__ = ["METHODS", "OBSERVERS", "FitReport", "FitRow", "Observer", "ObserverOptions", "calibrate", "fit_weights"]
